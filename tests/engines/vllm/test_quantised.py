"""Quantised checkpoints, served by vLLM: what transformers computes with dequantised weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import bad_weights
from checkpoints import random_prompt, write_checkpoint
from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from needs import needs
from quantised import AT_LOAD, KINDS, METHODS, MIXED, TWO_LAYERS, pack_checkpoint, quantise
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(length, seed=31) for length in (1, 3, 64, 65, 300)]
FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_batched_tokens": 257,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}
COMPILED = "mixed_compiled"
CASES: dict[str, tuple[str, str]] = {  # kind, and what is left out
    MIXED: (MIXED, "^$"),
    COMPILED: (MIXED, "^$"),
    "fp8_mtp-in-bf16": ("fp8-blocks", "^mtp"),
    **{kind: (kind, "^$") for kind in (*AT_LOAD, *KINDS)},
}


class Served(NamedTuple):
    engine: Offline
    model: Reference
    folder: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two blocks of columns, the second one not full; experts whose groups two ranks can share."""
    changes = {"hidden_size": 160, "num_hidden_layers": 4, "moe_intermediate_size": 64}
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **changes)


@pytest.fixture(scope="module", params=long_except((MIXED,), CASES))
def served(request, plain, tmp_path_factory, reference) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("quantised")
    kind, leave_out = CASES[request.param]
    quantised, env, twin = quantise(plain, folder, kind, leave_out=leave_out)
    engine = Offline(quantised, env=env, enforce_eager=request.param != COMPILED, **FLAGS)
    yield Served(engine, reference(twin), quantised, env)
    engine.close()


@pytest.mark.parametrize("drafts", [0, 3])
def test_with_and_without_drafts(served, drafts):
    served.engine.forget()
    served.engine.inside("draft", drafts)
    before = served.engine.counters()
    outputs = served.engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
    check_greedy(served.model, PROMPTS, outputs)
    name = "vllm:spec_decode_num_accepted_tokens"
    accepted = served.engine.counters().get(name, 0) - before.get(name, 0)
    assert (accepted > 0) == (drafts > 0)


def answers(engine: Offline, tokens: int = TOKENS) -> list[tuple]:
    outputs = engine.greedy(PROMPTS, tokens, **LOGPROBS)
    return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in outputs]


@pytest.mark.parametrize("mmap", long_except("1", "01"))
def test_packed_it_gives_the_same_bits(served, tmp_path, mmap):
    out = pack_checkpoint(served.folder, tmp_path / "out", served.env.get("QWEN3NEXT_QUANTISE"))
    engine = Offline(out, env={"QWEN3NEXT_MMAP": mmap}, **FLAGS)
    try:
        for drafts in (0, 3):
            for each in (engine, served.engine):
                each.inside("draft", drafts)
                each.forget()
            assert answers(engine) == answers(served.engine)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", METHODS)
def test_one_format_for_the_whole_file(tmp_path, reference, kind):
    """Of each method, as a released checkpoint has it; two layers and few tokens."""
    plain = write_checkpoint(tmp_path / "plain", **TWO_LAYERS)
    quantised, _, twin = quantise(plain, tmp_path, kind)
    engine = Offline(quantised, **FLAGS)
    try:
        outputs = engine.greedy(PROMPTS[:3], 12, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(reference(twin), PROMPTS[:3], outputs)


@needs("two-cores")
def test_two_ranks_of_a_packed_one(plain, tmp_path, reference):
    """Groups of columns, which ranks divide; few tokens, as below."""
    quantised, _, twin = quantise(plain, tmp_path, "packed_4-bit_zeros")
    out = pack_checkpoint(quantised, tmp_path / "out")
    engine = Offline(out, tensor_parallel_size=2, **FLAGS)
    try:
        outputs = engine.greedy(PROMPTS[:3], 12, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(reference(twin), PROMPTS[:3], outputs)


@pytest.mark.long
@needs("two-cores")
@pytest.mark.parametrize("kind", [MIXED, "nvfp4"])
def test_two_ranks(plain, tmp_path, reference, kind):
    """Few tokens: ranks wait for each other busily, which is slow where they share their cores."""
    quantised, _, twin = quantise(plain, tmp_path, kind)
    engine = Offline(quantised, tensor_parallel_size=2, **FLAGS)
    try:
        outputs = engine.greedy(PROMPTS[:3], 12, **LOGPROBS)
    finally:
        engine.close()
    check_greedy(reference(twin), PROMPTS[:3], outputs)


@pytest.mark.parametrize("fault", bad_weights.AS_READ)
def test_what_is_found_as_weights_load_ends_the_engine(tmp_path, fault):
    plain = write_checkpoint(tmp_path / "plain", **bad_weights.PLAIN)
    folder = bad_weights.write_faulty(plain, tmp_path, fault)
    with pytest.raises(AssertionError, match=bad_weights.FAULTS[fault].message):
        Offline(folder, dtype="float32", max_model_len=512)
