"""In bf16 a token has the same bits alone, in a batch, in other chunks and with drafts.

And from the prefix cache, and after preemption; in each format of the weights.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from engines.bits import prompts as texts
from engines.bits import served_in as served_in
from engines.checks import Output
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from tiers import long_except

pytestmark = pytest.mark.serve

LONGEST = 1300
TOKENS, FIRST = 24, 12
FLAGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_batched_tokens": 257,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}

# Where memory is for about four requests of a block each: all of these need a second one. And
# other chunks.
BLOCK, BLOCKS = 384, 14
PRESSED = range(BLOCK - 14, BLOCK, 2)
PRESSING = {"max_num_batched_tokens": 131, "max_num_seqs": 16, "max_model_len": 1024}


@pytest.fixture(scope="module")
def prompts(size) -> list[tuple[int, ...]]:
    return texts(many=size(False, True), longest=[LONGEST])


@pytest.fixture(scope="module")
def engine(served_in) -> Iterator[Offline]:
    model, env = served_in
    engine = Offline(model, env=dict(env), **FLAGS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(engine, prompts) -> Sequence[Output]:
    engine.inside("draft", 0)
    return [engine.greedy([ids], TOKENS, **LOGPROBS)[0] for ids in prompts]


@pytest.mark.parametrize("drafts", long_except([0, 3], [0, 1, 2, 3]))
def test_together_and_with_drafts(engine, prompts, alone, drafts):
    engine.inside("draft", drafts)
    found = engine.greedy(prompts, TOKENS, **LOGPROBS)
    for one, other in zip(found, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs


def test_drafts_read_no_more_than_the_router_and_the_input_in_bf16(engine):
    formats = engine.inside("packed")
    assert formats["MTP"] > {"bf16"}
    if formats["trunk"] == {"bf16"}:
        assert formats["MTP"] == {"bf16", "int8"}


@pytest.mark.parametrize("drafts", [0, 3])
def test_after_a_cache_hit(engine, prompts, alone, drafts):
    """Of two requests the second finds the prompt, and its first tokens, in the prefix cache."""
    engine.inside("draft", drafts)
    engine.forget()
    begun = engine.greedy(prompts, FIRST)
    continued = [ids + one.token_ids for ids, one in zip(prompts, begun, strict=True)]
    found = engine.greedy(continued, TOKENS - FIRST, logprobs=0)
    assert max(one.cached for one in found) > 0
    for one, other in zip(found, alone, strict=True):
        assert one.token_ids == other.token_ids[FIRST:]
        assert one.logprobs == other.logprobs[FIRST:]


def test_after_preemption(engine, prompts, alone, served_in, size):
    """In other chunks, too; with --long also of the other prompts."""
    engine.inside("draft", 0)
    engine.forget()
    asked = texts(many=False, longest=PRESSED)[-len(PRESSED) :]
    expected = [engine.greedy([ids], TOKENS, logprobs=0)[0] for ids in asked]
    for ids, one in zip(prompts, alone, strict=True):
        if size(False, True) and len(ids) + TOKENS <= PRESSING["max_model_len"]:
            asked.append(ids)
            expected.append(one)
    model, env = served_in
    pressed = Offline(model, env=dict(env), num_gpu_blocks_override=BLOCKS, **FLAGS | PRESSING)
    try:
        assert pressed.cache()["block_size"] == BLOCK
        before = 0.0
        for drafts in size((None, 3), (None, 0, 1, 2, 3)):  # None: adaptive, as it starts
            if drafts is not None:
                pressed.inside("draft", drafts)
            pressed.forget()
            found = pressed.greedy(asked, TOKENS, logprobs=0)
            counters = pressed.counters()
            assert counters["vllm:spec_decode_num_accepted_tokens"] > 0
            after = counters["vllm:num_preemptions"]
            assert after > before
            before = after
            for one, other in zip(found, expected, strict=True):
                assert one.token_ids == other.token_ids
                assert one.logprobs == other.logprobs
    finally:
        pressed.close()
