"""Quantised checkpoints: each tensor's format is read from the files, each fault is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from examples.qwen3_5_layout import rewrite
from quantised import KINDS, MIXED, write_quantised
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.kernels.linear import unpack
from qwen3next_plugin.model.formats import Formats
from qwen3next_plugin.model.layouts import CheckpointError
from qwen3next_plugin.model.packed import check_experts, check_split, pack_head, packs_head
from qwen3next_plugin.model.quantised import Format, dequantise
from qwen3next_plugin.model.quantising import quantised_bytes
from qwen3next_plugin.model.weights import formats_of, holder, parameters, trunk_tensors
from qwen3next_plugin.mtp.weights import mtp_tensors

# Two blocks of columns, the second one not full.
CHANGES = {"hidden_size": 160, "num_hidden_layers": 4, "num_experts": 3}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **CHANGES)


def load(folder: Path, asked: str | None = None, **changes):
    """The formats of a checkpoint, its config.json changed, and the tensors of our parameters."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    config = Qwen3NextConfig.from_hf(raw)
    shapes = trunk_tensors(config) | mtp_tensors(config)
    formats = formats_of(folder, config, shapes, raw.get("quantization_config"), asked=asked)
    stored = load_file(folder / "model.safetensors")
    return formats, dict(parameters(stored.items(), config, expected=shapes, formats=formats))


def check(quantised: Path, twin: Path) -> None:
    """What is loaded says exactly what the twin's weights are."""
    formats, found = load(quantised)
    raw = json.loads((twin / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    shapes = trunk_tensors(config) | mtp_tensors(config)
    stored = load_file(twin / "model.safetensors")
    for name, weight in parameters(stored.items(), config, expected=shapes):
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in found:
            tensors = {
                part: found[f"{module}.{part}"]
                for part in ("weight", "weight_scale", "weight_zero")
                if f"{module}.{part}" in found
            }
            got = dequantise(tensors, form_of(formats, module, config))
        else:
            got = found[name]
        torch.testing.assert_close(got, weight.float(), rtol=1e-6, atol=1e-7, msg=name)


def form_of(formats: Formats, module: str, config: Qwen3NextConfig) -> Format:
    """The format of a tensor of ours."""
    found = formats.of(holder(module, config))
    assert found is not None, module
    return found["w2" if "down_proj" in module else "w13"] if len(found) > 1 else found["weight"]


@pytest.mark.parametrize("kind", [*KINDS, MIXED])
def test_rows_are_the_dequantised_weights(plain, tmp_path, kind):
    quantised, twin = write_quantised(plain, tmp_path, kind)
    formats, _ = load(quantised)
    assert not formats.dequantised
    assert formats.of("model.layers.0.linear_attn.in_proj_qkvz")
    assert formats.of("language_model.model.layers.3.self_attn.qkv_proj")
    assert formats.of("mtp.layers.0.mlp.experts").keys() == {"w13", "w2"}
    assert formats.of("model.layers.0.mlp.gate") is None
    assert formats.of("lm_head") is None
    check(quantised, twin)


def test_flat_projections_and_split_experts(plain, tmp_path):
    """Qwen3.5's layout, whose projections are regrouped by head."""
    flat = rewrite(plain, tmp_path / "flat", wrapped=True, fused=False)
    quantised, twin = write_quantised(flat, tmp_path, "fp8-blocks")
    check(quantised, twin)
    assert not load(quantised)[0].dequantised


@pytest.mark.parametrize(
    "leave_out", [r"q_proj", r"^mtp\.", r"in_proj|experts\.1\.down", "layers.0"]
)
def test_what_is_left_out_is_read_from_the_files(plain, tmp_path, leave_out):
    """A module of ours of which a part is not quantised is dequantised as it loads."""
    quantised, twin = write_quantised(plain, tmp_path, "gptq_zeros", leave_out=leave_out)
    check(quantised, twin)
    dequantised = load(quantised)[0].dequantised
    assert bool(dequantised) == (leave_out not in (r"^mtp\.", "layers.0"))
    if leave_out == "q_proj":
        assert {name.rpartition(".")[2] for name in dequantised} == {"k_proj", "v_proj"}


Q = "model.layers.3.self_attn.q_proj"
FAULTS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "no scales": ("fp8-blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), "weight_scale.* is miss"),
    "no zeros": ("awq", lambda t: t.pop(f"{Q}.qzeros"), "quantised, and qzeros is missing"),
    "other blocks": (
        "fp8-blocks",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1)}),
        r"shape \(1, 1\), and blocks of 128 by 128 need \(2, 2\)",
    ),
    "group does not divide": (
        "packed_4-bit",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(256, 7)}),
        r"7 groups in a row of 160 columns, which they do not divide; quantise with a group size",
    ),
    "desc_act": (
        "gptq",
        lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].flip(0)}),
        r"g_idx reorders columns \(desc_act",
    ),
    "unknown": (
        "fp8-rows",
        lambda t: t.update({f"{Q}.weight_scale_2": torch.ones(1)}),
        r"not known here, with the tensors weight float8_e4m3fn, .*; use a checkpoint in",
    ),
    "nvfp4": (
        "fp8-rows",
        lambda t: t.update({f"{Q}.weight": torch.zeros(256, 80, dtype=torch.uint8)}),
        r"not known here, with the tensors weight uint8",
    ),
    "3 bits": (
        "gptq",
        lambda t: t.update({f"{Q}.qweight": torch.zeros(15, 256, dtype=torch.int32)}),
        "neither 4 nor 8 bits",
    ),
    "8 bits with zeros": (
        "gptq_8-bit",
        lambda t: t.update({f"{Q}.qzeros": torch.zeros_like(t[f"{Q}.qzeros"])}),
        "zero points other than 128; use symmetric",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(plain, tmp_path, fault):
    kind, damage, message = FAULTS[fault]
    quantised, _ = write_quantised(plain, tmp_path, kind)
    path = quantised / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"^{Q}: .*{message}"):
        load(quantised)


def test_ranks_that_would_share_a_scale():
    form = Format("int4", 128, torch.float16)
    check_split("m", form, 256, 128)
    check_split("m", form, 64, 64)  # one rank
    check_split("m", replace(form, group=0), 256, 64)
    with pytest.raises(ConfigError, match=r"^m: a rank's 64 of 256 columns .* 128, which share"):
        check_split("m", form, 256, 64)
    check_experts("m", form, 256, 128)
    with pytest.raises(ConfigError, match=r"^m: a rank's 64 of 256 columns"):
        check_experts("m", form, 256, 64)
    with pytest.raises(ConfigError, match=r"^m: packed experts have 24 inner features"):
        check_experts("m", replace(form, group=0), 48, 24)


# quantised as they load --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("int8", 0.51), ("int4", 1.05)])
def test_plain_weights_are_rounded_to_the_nearest(plain, name, steps):
    formats, found = load(plain, name)
    config = Qwen3NextConfig.from_hf(json.loads((plain / "config.json").read_text()))
    sizes = quantised_bytes(name, trunk_tensors(config) | mtp_tensors(config))
    stored = load_file(plain / "model.safetensors")
    for module, kept in formats.stored.items():
        form = kept.format
        tensors = {last: found.pop(f"{module}.{last}") for last in form.names}
        weight, scale = stored.pop(f"{module}.weight"), tensors["weight_scale"].float().abs()
        most = scale.repeat_interleave(form.group or weight.shape[1], dim=1)
        assert ((dequantise(tensors, form) - weight).abs() <= steps * most).all(), module
        assert sizes.pop(f"{module}.weight") == sum(t.nbytes for t in tensors.values())
    assert [*sizes] == ["lm_head.weight"]
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in stored.items()}
    assert "model.layers.0.linear_attn.in_proj_ba.weight" in found
    said = formats.described()
    assert f"QWEN3NEXT_QUANTISE={name}: {len(formats.stored) + 1} of " in said
    assert "the output head is int8; embeddings, routers," in said


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_output_head_is_int8(monkeypatch, name):
    weight = torch.randn(50, 160).bfloat16()
    plain = pack_head(weight) if packs_head(torch.bfloat16) else None
    assert plain is None or plain.format == "bf16"
    assert not packs_head(torch.float32)
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", name)
    assert packs_head(torch.float32)
    head = pack_head(weight)
    assert head.format == "int8"
    shapes = {"model.embed_tokens.weight": (50, 160)}
    assert quantised_bytes(name, shapes) == {"lm_head.weight": 50 * 160 + 50 * 4}
    step = weight.float().abs().amax(1) / 127
    error = (unpack(head.weight) - weight.float()).abs().amax(1)
    assert (error <= 0.51 * step).all()


def test_what_is_quantised_is_not_quantised_again(plain):
    with pytest.raises(CheckpointError, match=r"QWEN3NEXT_QUANTISE=int8: .* quantised already"):
        load(plain, "int8", quantization_config={"quant_method": "fp8"})


def test_config_that_is_not_of_the_files(plain):
    with pytest.raises(CheckpointError, match="no tensor of the files is quantised"):
        load(plain, quantization_config={"quant_method": "fp8"})
