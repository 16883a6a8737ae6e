"""Prompts that share a prefix find its page: behind the first message, or where they part."""

from collections.abc import Iterator

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.sglang.server import NEXTN, Forked, Server
from engines.shared_prefixes import CHATS, SHARED, SYSTEM, TEXTS

pytestmark = pytest.mark.serve

FLAGS = ("--dtype", "float32", "--max-total-tokens", "32768", "--max-mamba-cache-size", "40")
GRID = 64  # tokens: SGLang has junctions at multiples of it


@pytest.fixture(scope="module", params=["plain", "drafts"])
def server(request, checkpoint) -> Iterator[Server]:
    drafts = (*NEXTN, "3") if request.param == "drafts" else ()
    server = Forked(checkpoint, *FLAGS, *drafts).wait()
    yield server
    server.close()


@pytest.fixture
def cached(server, reference, checkpoint):
    """Sends prompts one after another; returns the cached tokens of each."""

    def cached(prompts: list[tuple[int, ...]]) -> list[int]:
        answers = [server.greedy([prompt], 4, return_logprob=True)[0] for prompt in prompts]
        check_greedy(reference(checkpoint), prompts, answers)
        return [answer.cached for answer in answers]

    server.forget()
    return cached


def test_from_the_third_prompt_on_what_is_shared_is_cached(cached):
    junction = SHARED // GRID * GRID
    assert cached(TEXTS) == [0, 0, junction, junction]


def test_a_system_message_is_cached_by_the_first_chat(cached):
    assert cached(CHATS) == [0, SYSTEM, SYSTEM]


def test_below_a_junction_there_may_be_another(cached):
    stem, branch = TEXTS[0][:SHARED], random_prompt(400, seed=11)
    others = [stem + branch + random_prompt(99, seed=n) for n in (12, 13, 14)]
    found = cached([*TEXTS[:2], *others])
    assert found[2] == SHARED // GRID * GRID
    assert found[4] == (SHARED + len(branch)) // GRID * GRID


def test_a_burst_of_chats_reads_the_system_message_once(server, reference, checkpoint):
    server.forget()
    answers = server.greedy(CHATS, 4, return_logprob=True)
    check_greedy(reference(checkpoint), CHATS, answers)
    assert sorted(answer.cached for answer in answers) == [0, SYSTEM, SYSTEM]
