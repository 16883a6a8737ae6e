"""Qwen4-Exp: `generate(use_mtp=True)` answers as without it.

Sparse attention is past its budget in the longer prompts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints import random_prompt
from engines.transformers.checks import TOKENS, both, check_drafts, left_padded
from extras.qwen4_exp.model import StreamsReference, write_qwen4_exp
from extras.qwen4_exp.prompts import OTHER_SIZES
from qwen3next_plugin.model.checkpoint.errors import CheckpointError

BUDGET = {"indexer_budget": 16}  # tokens that a token reads
LONG = random_prompt(40, seed=32)
BATCH = (random_prompt(30, seed=31), random_prompt(1, seed=31), random_prompt(17, seed=31))
END = 1  # of a text
SIZES = OTHER_SIZES | BUDGET | {"ple_layer_ids": [1, 2]}


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_qwen4_exp(tmp_path_factory.mktemp("qwen4_exp"), **BUDGET)


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return load(folder)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_greedy_text_is_the_same(model, steps, drafts):
    plain, ours = both(model, BATCH, num_assistant_tokens=drafts)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS
    assert max(steps[1:]) == drafts + 1


def test_ends_of_text_end_n_grams(model):
    """In prompts, and a row that ends while others go on."""
    prompts = tuple((*LONG[:n], END, *LONG[n : 2 * n], END) for n in (1, 2, 9))
    plain, _ = both(model, prompts)
    settings = {"eos_token_id": int(plain[0, -TOKENS + 4]), "pad_token_id": 2}
    plain, ours = both(model, prompts, **settings, num_assistant_tokens=4)
    assert torch.equal(ours, plain)
    assert (plain[0, -TOKENS + 5 :] == 2).all()


def test_drafts_are_those_of_the_mtp_head(model, folder, made):
    model.set_attn_implementation("eager")  # of one prompt: before 5.24, padding makes it NaN
    try:
        plain, ours = both(model, (LONG,))
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(ours, plain)
    check_drafts(StreamsReference(folder), LONG, ours, made)


def test_a_seed_gives_the_same_sample(model, steps):
    given = {"max_new_tokens": TOKENS, "do_sample": True, "temperature": 0.9, "top_k": 20}
    inputs = left_padded((LONG,))
    torch.manual_seed(0)
    plain = model.generate(**inputs, **given)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **given, use_mtp=True), plain)
    assert len(steps) < TOKENS


def test_other_sizes_and_a_wrapper(tmp_path, steps):
    plain, ours = both(load(write_qwen4_exp(tmp_path, wrapped=True, **SIZES)), BATCH)
    assert torch.equal(ours, plain)
    assert len(steps) < TOKENS


def test_a_table_in_fp8_is_refused(tmp_path):
    folder = write_qwen4_exp(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    shard = next(name for name in tensors if "ngram_embedding.shard_" in name)
    scale = f"{shard.split('shard_')[0]}weight_scale"
    save_file(tensors | {scale: torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"weight_scale: .* FP8; serve .* under vLLM or"):
        load(folder)


def test_the_engines_bits_are_refused(folder, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match=r"QWEN3NEXT_BATCH_INVARIANT=1: .* Qwen4-Exp .* unset it"):
        load(folder)
