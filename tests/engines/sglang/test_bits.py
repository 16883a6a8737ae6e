"""In bf16 a token has the same bits alone, in a batch, in chunks, with drafts, from the cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from checkpoints import SHIPPED
from engines.sglang.server import FIXED, NEXTN, Answer, Forked
from engines.traffic import source_tokens
from tiers import long_except

pytestmark = pytest.mark.serve

LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 129, 200, 255, 300, 511, 700)
TOKENS, FIRST = 24, 12
FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "8192")
CHUNKS = ("--chunked-prefill-size", "67")
LOGPROBS: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}
INVARIANT = {"QWEN3NEXT_BATCH_INVARIANT": "1"}
# Formats of the weights; all but the first with --long.
ENVS = {"bf16": INVARIANT, "int8": INVARIANT | {"QWEN3NEXT_QUANTISE": "int8"}}
Bits = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]


class Bitwise(NamedTuple):
    """What a server answers to the prompts: alone, all at once, and in two requests each.

    The second of two requests finds prompt and first tokens in the radix cache.
    """

    alone: Sequence[Bits]
    together: Sequence[Bits]
    continued: Sequence[Bits]


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    ids = source_tokens()
    return [tuple(ids[37 * i :][:length]) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=long_except(["bf16"], ENVS))
def env(request) -> dict[str, str]:
    return ENVS[request.param]


@pytest.fixture(scope="module")
def plain(prompts, env) -> Bitwise:
    return served(prompts, env)


def served(prompts: Sequence[tuple[int, ...]], env: dict[str, str], *flags: str) -> Bitwise:
    server = Forked(SHIPPED, *FLAGS, *flags, env=env).wait()
    try:
        alone = [server.greedy([ids], TOKENS, **LOGPROBS)[0] for ids in prompts]
        together = server.greedy(prompts, TOKENS, **LOGPROBS)
        server.forget()
        texts = [
            ids + answer.token_ids
            for ids, answer in zip(prompts, server.greedy(prompts, FIRST), strict=True)
        ]
        continued = server.greedy(texts, TOKENS - FIRST, return_logprob=True)
    finally:
        server.close()
    assert max(answer.cached for answer in continued) > 0
    return Bitwise(*(list(map(bits, answers)) for answers in (alone, together, continued)))


def bits(answer: Answer) -> Bits:
    return answer.token_ids, answer.logprobs, answer.prompt_logprobs


def test_alone_or_together(plain):
    assert plain.together == plain.alone


def rest(answers: Sequence[Bits]) -> list[Bits]:
    """What a continuation should have: the tokens after the first, and their bits."""
    return [(ids[FIRST:], logprobs[FIRST:], ()) for ids, logprobs, _ in answers]


def test_after_a_cache_hit(plain):
    assert plain.continued == rest(plain.alone)


def test_in_chunks_and_with_drafts(prompts, env, plain):
    found = served(prompts, env | FIXED, *CHUNKS, *NEXTN, "3")
    assert found.alone == plain.alone
    assert found.together == plain.alone
    assert found.continued == rest(plain.alone)
