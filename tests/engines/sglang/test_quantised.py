"""Quantised checkpoints, served by SGLang: what transformers computes with dequantised weights."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import bad_weights
from checkpoints import random_prompt, write_checkpoint
from engines.checks import TOKENS, check_greedy
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from needs import needs
from quantised import AT_LOAD, KINDS, METHODS, MIXED, TWO_LAYERS, pack_checkpoint, quantise
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(length, seed=31) for length in (1, 3, 64, 65, 300)]
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
SMALL = ("--dtype", "float32", "--max-total-tokens", "8192", "--max-mamba-cache-size", "20")
CASES: dict[str, tuple[str, int, str]] = {  # kind, drafts, what is left out
    MIXED: (MIXED, 3, "^$"),
    "mixed_no-drafts": (MIXED, 0, "^$"),
    "fp8_mtp-in-bf16": ("fp8-blocks", 3, "^mtp"),
    **{kind: (kind, 3, "^$") for kind in (*AT_LOAD, *KINDS)},
}


class Served(NamedTuple):
    server: Server
    model: Reference
    drafts: int
    folder: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two blocks of columns, the second one not full."""
    changes = {"hidden_size": 160, "num_hidden_layers": 4}
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **changes)


def drafting(drafts: int) -> tuple[str, ...]:
    return (*NEXTN, str(drafts)) if drafts else ()


@pytest.fixture(scope="module", params=long_except((MIXED,), CASES))
def served(request, plain, tmp_path_factory, reference) -> Iterator[Served]:
    kind, drafts, leave_out = CASES[request.param]
    folder = tmp_path_factory.mktemp("quantised")
    quantised, env, twin = quantise(plain, folder, kind, leave_out=leave_out)
    server = Forked(quantised, *SMALL, *drafting(drafts), env=FIXED | env).wait()
    yield Served(server, reference(twin), drafts, quantised, env)
    server.close()


def test_batch_is_what_transformers_computes(served):
    answers = served.server.greedy(PROMPTS, TOKENS, **LOGPROBS)
    check_greedy(served.model, PROMPTS, answers)
    assert (sum(answer.accepted for answer in answers) > 0) == (served.drafts > 0)


@pytest.mark.parametrize("mmap", long_except("1", "01"))
def test_packed_it_gives_the_same_bits(served, tmp_path, mmap):
    out = pack_checkpoint(served.folder, tmp_path / "out", served.env.get("QWEN3NEXT_QUANTISE"))
    env = FIXED | {"QWEN3NEXT_MMAP": mmap}
    server = Forked(out, *SMALL, *drafting(served.drafts), env=env).wait()
    try:
        for prompt in PROMPTS:  # alone: a batch may be divided in other ways
            found = []
            for each in (server, served.server):
                each.forget()
                found += each.greedy([prompt], TOKENS, **LOGPROBS)
            packed, source = ((o.token_ids, o.logprobs, o.prompt_logprobs) for o in found)
            assert packed == source
    finally:
        server.close()


@pytest.mark.parametrize("kind", METHODS)
def test_one_format_for_the_whole_file(tmp_path, reference, kind):
    """Of each method, as a released checkpoint has it; two layers and few tokens."""
    plain = write_checkpoint(tmp_path / "plain", **TWO_LAYERS)
    quantised, _, twin = quantise(plain, tmp_path, kind)
    server = Forked(quantised, *SMALL, *drafting(3), env=FIXED).wait()
    try:
        answers = server.greedy(PROMPTS[:3], 12, **LOGPROBS)
    finally:
        server.close()
    check_greedy(reference(twin), PROMPTS[:3], answers)


@pytest.mark.long
@needs("two-cores")
def test_two_ranks_of_a_packed_one(plain, tmp_path, reference):
    """Groups of columns, which ranks divide; few tokens: ranks that share a core are slow."""
    quantised, _, twin = quantise(plain, tmp_path, "packed_4-bit_zeros")
    out = pack_checkpoint(quantised, tmp_path / "out")
    server = Forked(out, "--tp-size", "2", *SMALL, *drafting(3), env=FIXED).wait()
    try:
        answers = server.greedy(PROMPTS[:3], 12, **LOGPROBS)
    finally:
        server.close()
    check_greedy(reference(twin), PROMPTS[:3], answers)


@pytest.mark.parametrize("fault", bad_weights.AS_READ)
def test_what_is_found_as_weights_load_ends_the_server(tmp_path, fault):
    plain = write_checkpoint(tmp_path / "plain", **bad_weights.PLAIN)
    folder = bad_weights.write_faulty(plain, tmp_path, fault)
    assert re.search(bad_weights.FAULTS[fault].message, Forked(folder, *SMALL).refusal())
