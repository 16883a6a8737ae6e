"""Prompts that share a prefix find its page: behind the first message, or where they part."""

from collections.abc import Iterator

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.shared_prefixes import CHATS, END, SHARED, SYSTEM, TEXTS, message
from engines.vllm.offline import Offline
from qwen3next_plugin.engines.shared_prefixes import LEAST
from qwen3next_plugin.engines.vllm.prefix_pages import UNIT, SharedPrefixes

pytestmark = pytest.mark.serve

DRAFTS = {"method": "mtp", "num_speculative_tokens": 3}


@pytest.fixture(scope="module", params=[None, DRAFTS], ids=["plain", "drafts"])
def engine(request, checkpoint) -> Iterator[Offline]:
    engine = Offline(
        checkpoint, dtype="float32", max_model_len=4096, speculative_config=request.param
    )
    engine.dropped = UNIT if request.param else 0
    yield engine
    engine.close()


@pytest.fixture
def cached(engine, reference, checkpoint):
    """Sends prompts one after another; returns the cached tokens of each."""

    def cached(prompts: list[tuple[int, ...]]) -> list[int]:
        answers = [engine.greedy([prompt], 4, logprobs=0)[0] for prompt in prompts]
        check_greedy(reference(checkpoint), prompts, answers)
        return [answer.cached for answer in answers]

    engine.forget()
    return cached


def at(engine: Offline, tokens: int) -> int:
    """Where a prefix is found: at a unit; with drafts one before."""
    return tokens // UNIT * UNIT - engine.dropped


def test_from_the_third_prompt_on_what_is_shared_is_cached(engine, cached):
    junction = at(engine, SHARED)
    assert cached(TEXTS) == [0, 0, junction, junction]


def test_a_system_message_is_cached_by_the_first_chat(engine, cached):
    assert cached(CHATS) == [0, at(engine, SYSTEM), at(engine, SYSTEM)]


def test_below_a_junction_there_may_be_another(engine, cached):
    stem, branch = TEXTS[0][:SHARED], random_prompt(420, seed=11)
    others = [stem + branch + random_prompt(99, seed=n) for n in (12, 13, 14)]
    found = cached([*TEXTS[:2], *others])
    assert found[2] == at(engine, SHARED)
    assert found[4] == at(engine, SHARED + len(branch))


def test_each_turn_of_a_conversation_is_cached_up_to_the_turn_before(engine, cached):
    turns = [message(300, 20) + message(90, 21)]
    for n in range(22, 30, 2):
        turns.append(turns[-1] + message(80, n) + message(50, n + 1))
    found = cached(turns)
    least = LEAST + 2 * UNIT  # the farthest page from the end that is near enough
    assert found[0] == 0
    assert found[1] > 300 - least
    for turn, tokens in zip(turns[1:], found[2:], strict=False):
        assert len(turn) - least < tokens <= len(turn)


def test_the_end_of_a_prompt_is_a_place_if_it_is_worth_a_step():
    places = SharedPrefixes(UNIT, 1280, {END}, with_drafts=False)

    def foreseen(prompt: tuple[int, ...], cached: int = 0, junction: int = 0) -> list[int]:
        sampling = SamplingParams()
        request = Request("one", list(prompt), sampling, None)
        places.foresee(request, cached, junction)
        return list(places.places[request])

    text, chat = random_prompt(1200, seed=30), 4 * message(300, 31)
    assert foreseen(text[:1000]) == []
    assert foreseen(text) == [1184]
    assert foreseen(text, cached=640) == []
    assert foreseen(text, cached=640, junction=720) == [720]
    assert foreseen(text, cached=640, junction=688) == []
    assert foreseen(chat) == [288, 1184]
    assert foreseen(chat, cached=640) == [1184]
    assert foreseen(chat, cached=1136) == []


def test_prompts_of_one_step_copy_nothing_that_it_computes(engine, reference, checkpoint):
    """Behind a cached first message, each the same twice; some fill the block."""
    engine.forget()
    engine.greedy([CHATS[0]], 1)
    head = CHATS[0][:SYSTEM]
    prompts = [head + random_prompt(n, seed=n) for n in (1, 30, 200, 400) for _ in range(2)]
    answers = engine.greedy(prompts, 4, logprobs=0)
    check_greedy(reference(checkpoint), prompts, answers)
    assert {answer.cached for answer in answers} >= {at(engine, SYSTEM)}
    assert all(answer.cached >= at(engine, SYSTEM) for answer in answers)


@pytest.mark.parametrize(("drafts", "blocks"), [(None, 15), (DRAFTS, 13)], ids=["plain", "drafts"])
def test_the_longest_prompt_begins_within_a_block_or_anew(checkpoint, reference, drafts, blocks):
    """Where the cache has room for it and no more."""
    flags = {"dtype": "float32", "max_model_len": 1024, "num_gpu_blocks_override": blocks}
    engine = Offline(checkpoint, **flags, speculative_config=drafts)
    try:
        prompts = [message(500, 40) + message(n, n) for n in (50, 500)]
        answers = [engine.greedy([prompt], 8, logprobs=0)[0] for prompt in prompts]
        check_greedy(reference(checkpoint), prompts, answers)
    finally:
        engine.close()
