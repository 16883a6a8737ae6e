"""Qwen4-Exp (Qwen3.8-Flash-Next) under vLLM: in fp32, what transformers computes."""

from collections.abc import Iterator
from typing import Any

import pytest

from checkpoints import random_prompt
from engines.bits import INVARIANT
from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS, check_cache_hits
from engines.vllm.offline import Offline
from extras.qwen4_exp.model import StreamsReference, write_qwen4_exp
from extras.qwen4_exp.prompts import OTHER_SIZES, PROMPTS, SLICE, with_ends_of_text
from needs import needs

pytestmark = pytest.mark.serve

FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": SLICE,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen4_exp(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.fixture(scope="module")
def model(folder) -> StreamsReference:
    return StreamsReference(folder)


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[Offline]:
    engine = Offline(folder, env={"QWEN3NEXT_DRAFTS": "fixed"}, **FLAGS)
    yield engine
    engine.close()


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
def test_any_number_of_drafts_gives_what_transformers_computes(engine, model, num_drafts):
    engine.forget()
    engine.inside("draft", num_drafts)
    check_greedy(model, PROMPTS, engine.greedy(PROMPTS, TOKENS, **LOGPROBS))


def test_each_prompt_alone(engine, model):
    engine.forget()
    engine.inside("draft", 0)
    outputs = [engine.greedy([prompt], TOKENS, **LOGPROBS)[0] for prompt in PROMPTS[::2]]
    check_greedy(model, PROMPTS[::2], outputs)


def test_ends_of_text_end_n_grams(engine, model):
    prompts = with_ends_of_text(model.trunk.config.eos_token_id)
    engine.inside("draft", 2)
    check_greedy(model, prompts, engine.greedy(prompts, TOKENS, **LOGPROBS))


def test_prefix_cache_hits(engine, model):
    engine.inside("draft", 2)
    block = engine.cache()["block_size"]
    prompts = [random_prompt(n, seed=33) for n in (2 * block, 2 * block + 1)]
    check_greedy(model, prompts, check_cache_hits(engine, prompts))


def test_drafts_are_accepted_as_often_as_the_reference_head_is_right(engine, model):
    num_drafts, name = 4, "vllm:spec_decode_num_accepted_tokens"
    engine.inside("draft", num_drafts)
    engine.forget()
    prompt = random_prompt(130, seed=34)
    before = engine.counters().get(name, 0)
    (answer,) = engine.greedy([prompt], 64)
    accepted = engine.counters()[name] - before
    made, right = model.accepted(prompt, answer.token_ids, num_drafts)
    assert right > 0.2 * made
    assert abs(accepted - right) <= num_drafts


def test_preempted_requests_end_as_undisturbed_ones(folder, model):
    flags = FLAGS | {"max_model_len": 512, "num_gpu_blocks_override": 40, "prefix_match_unit": 16}
    prompts = [random_prompt(n, seed=5) for n in (100, 120, 126, 127, 250, 255, 256, 257)]
    engine = Offline(folder, **flags)
    try:
        outputs = engine.greedy(prompts, 160, logprobs=0)
        assert engine.counters()["vllm:num_preemptions"] > 0
    finally:
        engine.close()
    check_greedy(model, prompts, outputs)


def test_other_sizes_compiled(tmp_path):
    folder = write_qwen4_exp(tmp_path, seed=1, **OTHER_SIZES)
    engine = Offline(folder, **FLAGS | {"enforce_eager": False})
    try:
        outputs = engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(StreamsReference(folder), PROMPTS, outputs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_a_vision_tower_is_served_for_texts(tmp_path, model, wrapped):
    """And its table of n-grams in memory; named with and without the flag."""
    folder = write_qwen4_exp(tmp_path, wrapped=True)
    engine = Offline(
        folder, env={"QWEN3NEXT_NGRAM": "resident"}, **FLAGS, language_model_only=wrapped
    )
    try:
        outputs = engine.greedy(PROMPTS[-3:], TOKENS, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(model, PROMPTS[-3:], outputs)


@needs("two-cores")
def test_two_ranks(folder, model):
    prompts = [random_prompt(n, seed=12) for n in (1, 130)]
    engine = Offline(folder, **FLAGS, tensor_parallel_size=2)
    try:
        outputs = engine.greedy(prompts, 10, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(model, prompts, outputs)


def test_in_bf16_a_token_has_the_same_bits_alone_in_a_batch_and_with_drafts(folder):
    """And from the prefix cache, in slices of other sizes."""
    found = []
    cases = {257: ((0, False), (0, True), (4, True)), 67: ((4, True),)}
    for tokens, runs in cases.items():
        flags = FLAGS | {"dtype": "bfloat16", "max_num_batched_tokens": tokens}
        engine = Offline(folder, env=INVARIANT, **flags | {"max_num_seqs": 8})
        try:
            for drafts, batch in runs:
                engine.inside("draft", drafts)
                engine.forget()
                groups = [PROMPTS] if batch else [[prompt] for prompt in PROMPTS]
                found += [
                    [one for group in groups for one in engine.greedy(group, TOKENS, **LOGPROBS)]
                ]
            found += [engine.greedy(PROMPTS, TOKENS, logprobs=0)]
        finally:
            engine.close()
    for run in found[1:]:
        for one, other in zip(run, found[0], strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs
            if one.prompt_logprobs is not None:
                assert one.prompt_logprobs == other.prompt_logprobs
