"""In bf16 a token has the same bits alone, in a batch, in chunks, with drafts, from the cache.

And after retraction; in each format of the weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines.bits import LENGTHS
from engines.bits import prompts as texts
from engines.bits import served_in as served_in
from engines.sglang.server import FIXED, NEXTN, Answer, Forked
from tiers import long_except

pytestmark = pytest.mark.serve

TOKENS, FIRST = 24, 12
CACHED = 16  # prompts whose pages there is room for at a time
FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "8192", "--enable-metrics")
CHUNKS = ("--chunked-prefill-size", "67")
LOGPROBS: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}
# Of other requests: with drafts a step reads prompts or verifies.
MIXED = ("--enable-mixed-chunk",)
# A request is retracted every so many steps: fewer than `TOKENS` take, whatever the drafts.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
Weights = tuple[Path, Mapping[str, str]]
Bits = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...] | None]


class Bitwise(NamedTuple):
    """What a server answers: to the first prompts alone, to all at once, and in two requests each.

    The second of two requests finds prompt and first tokens in the radix cache.
    """

    alone: Sequence[Bits]
    together: Sequence[Bits]
    continued: Sequence[Bits]
    accepted: int  # drafts of all of them together


@pytest.fixture(scope="module")
def prompts(size) -> list[tuple[int, ...]]:
    return texts(many=size(False, True))


@pytest.fixture(scope="module")
def plain(prompts, served_in) -> Bitwise:
    return served(prompts, served_in, {}, alone=len(prompts))


def served(
    prompts: Sequence[tuple[int, ...]],
    weights: Weights,
    more: dict[str, str],
    *flags: str,
    alone: int = len(LENGTHS),
) -> Bitwise:
    model, env = weights
    server = Forked(model, *FLAGS, *flags, env=env | more).wait()
    try:
        found = [server.greedy([ids], TOKENS, **LOGPROBS)[0] for ids in prompts[:alone]]
        together = server.greedy(prompts, TOKENS, **LOGPROBS)
        server.forget()
        continued: list[Answer] = []
        for i in range(0, len(prompts), CACHED):
            some = prompts[i : i + CACHED]
            answers = server.greedy(some, FIRST)
            begun = [ids + one.token_ids for ids, one in zip(some, answers, strict=True)]
            continued += server.greedy(begun, TOKENS - FIRST, return_logprob=True)
        retracted = server.metrics().get("sglang:num_retracted_requests_total", 0)
    finally:
        server.close()
    assert (retracted > 0) == (RETRACT.items() <= more.items())
    assert max(answer.cached for answer in continued) > 0
    each = (list(map(bits, answers)) for answers in (found, together, continued))
    return Bitwise(*each, accepted=sum(answer.accepted for answer in together))


def bits(answer: Answer) -> Bits:
    return answer.token_ids, answer.logprobs, answer.prompt_logprobs


def test_alone_or_together(plain):
    assert plain.together == plain.alone


def rest(answers: Sequence[Bits]) -> list[Bits]:
    """What a continuation should have: the tokens after the first, and their bits."""
    return [(ids[FIRST:], logprobs[FIRST:], None) for ids, logprobs, _ in answers]


def test_after_a_cache_hit(plain):
    assert plain.continued == rest(plain.alone)


@pytest.mark.parametrize("drafts", long_except(["adaptive"], ["adaptive", 0, 1, 2, 3]))
def test_in_chunks_with_drafts_and_retracted(prompts, served_in, plain, drafts):
    schedule, steps = ({}, 3) if drafts == "adaptive" else (FIXED, drafts)
    more = (*NEXTN, str(steps)) if steps else MIXED
    found = served(prompts, served_in, schedule | RETRACT, *CHUNKS, *more)
    assert (found.accepted > 0) == (steps > 0)
    assert found.alone == plain.alone[: len(found.alone)]
    assert found.together == plain.alone
    assert found.continued == rest(plain.alone)
