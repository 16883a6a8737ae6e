"""examples/qwen3_5_layout.py: transformers' Qwen3.5 computes what its Qwen3-Next computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import BASE, SHIPPED, random_prompt
from family import FAMILY
from reference import Reference

PROMPT = random_prompt(70)
TOLERANCE = 1e-4  # between two forms of the same fp32 products


def check_equal(plain: Path, rewritten: Path, prompt: tuple[int, ...]) -> None:
    expected, found = Reference(plain), Reference(rewritten)
    error = (found.logprobs(prompt) - expected.logprobs(prompt)).abs().max()
    assert error < TOLERANCE
    answer = expected.greedy(prompt, 16)
    assert found.accepted(prompt, answer, 2) == expected.accepted(prompt, answer, 2)


@pytest.mark.parametrize("name", FAMILY)
def test_random_checkpoints_compute_the_same(tmp_path, name):
    plain, rewritten = FAMILY[name].pair(tmp_path)
    check_equal(plain, rewritten, PROMPT)
    raw = json.loads((rewritten / "config.json").read_text())
    wrapped, moe = "wrapped" in name, "moe" in name
    kind = "ForConditionalGeneration" if wrapped else "ForCausalLM"
    assert raw["architectures"] == [f"Qwen3_5{'Moe' if moe else ''}{kind}"]
    tensors = load_file(rewritten / "model.safetensors")
    prefix = "model.language_model." if wrapped else "model."
    assert f"{prefix}layers.0.linear_attn.in_proj_qkv.weight" in tensors
    assert any(key.endswith("experts.gate_up_proj") for key in tensors) == (
        moe and "split" not in name
    )


@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=pytest.mark.long), ["--wrapped"]], ids=["text", "wrapped"]
)
def test_the_script_rewrites_the_shipped_checkpoint(tmp_path, flags):
    command = [sys.executable, "examples/qwen3_5_layout.py", str(SHIPPED), str(tmp_path), *flags]
    subprocess.run(command, cwd=SHIPPED.parents[1], check=True)
    check_equal(SHIPPED, tmp_path, PROMPT)
    assert (tmp_path / "tokenizer.json").is_file()
    before, after = (load_file(f / "model.safetensors") for f in (SHIPPED, tmp_path))
    sizes = [
        sum(t.numel() for name, t in tensors.items() if "visual" not in name)
        for tensors in (before, after)
    ]
    assert sizes[0] == sizes[1]
    assert {t.dtype for t in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(changes, named):
    from examples.qwen3_5_layout import qwen3_5_config

    with pytest.raises(ValueError, match=named):
        qwen3_5_config(BASE | changes, wrapped=False)
