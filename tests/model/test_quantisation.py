"""Quantised checkpoints: each tensor's format is read from the files, each fault is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import quantised
from bad_weights import FAULTS, PLAIN, Q, write_faulty
from checkpoints import write_checkpoint
from examples.qwen3_5_layout import rewrite
from model.weights import check, load
from quantised import KINDS, MIXED, pack_checkpoint, packed, write_quantised
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, read_config
from qwen3next_plugin.kernels.linear import unpack
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation import format as format_module
from qwen3next_plugin.model.quantisation.at_load import quantise, quantised_bytes
from qwen3next_plugin.model.quantisation.files import (
    check_version,
    plain_modules_of,
    read_formats,
)
from qwen3next_plugin.model.quantisation.format import Format, Module, dequantise
from qwen3next_plugin.model.quantisation.layers import check_experts, check_split
from qwen3next_plugin.model.quantisation.packing import pack, pack_plain, plain_as_int8
from qwen3next_plugin.model.quantisation.schemes import scheme


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **PLAIN)


@pytest.mark.parametrize("kind", [*KINDS, MIXED])
def test_what_is_loaded_are_the_dequantised_weights(plain, tmp_path, kind):
    quantised, twin = write_quantised(plain, tmp_path, kind)
    formats, _ = load(quantised)
    assert not formats.dequantised
    assert formats.of("model.layers.0.linear_attn.in_proj_qkvz")
    assert formats.of("language_model.model.layers.3.self_attn.qkv_proj")
    assert formats.of("mtp.layers.0.mlp.experts").keys() == {"w13", "w2"}
    assert formats.of("model.layers.0.mlp.gate") is None
    assert formats.of("lm_head") is None
    check(quantised, twin)


@pytest.mark.parametrize("kind", ["fp8-blocks", "nvfp4", "mxfp4"])
def test_flat_projections_and_split_experts(plain, tmp_path, kind):
    """Qwen3.5's layout, whose projections are regrouped by head."""
    flat = rewrite(plain, tmp_path / "flat", wrapped=True, fused=False)
    quantised, twin = write_quantised(flat, tmp_path, kind)
    check(quantised, twin)
    assert not load(quantised)[0].dequantised


@pytest.mark.parametrize(
    "leave_out", [r"q_proj", r"^mtp\.", r"in_proj|experts\.1\.down", "layers.0"]
)
@pytest.mark.parametrize("kind", ["gptq_zeros", "nvfp4_compressed"])
def test_what_is_left_out_is_read_from_the_files(plain, tmp_path, kind, leave_out):
    """A module of ours of which a part is not quantised is dequantised as it loads."""
    quantised, twin = write_quantised(plain, tmp_path, kind, leave_out=leave_out)
    check(quantised, twin)
    dequantised = load(quantised)[0].dequantised
    assert bool(dequantised) == (leave_out not in (r"^mtp\.", "layers.0"))
    if leave_out == "q_proj":
        assert {name.rpartition(".")[2] for name in dequantised} == {"k_proj", "v_proj"}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(plain, tmp_path, fault):
    with pytest.raises(CheckpointError, match=FAULTS[fault].message):
        load(write_faulty(plain, tmp_path, fault))


def test_fp8_in_groups_of_128_columns():
    """Of which the last one may have fewer."""
    tensors = {
        "weight": torch.randn(6, 160).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(6, 2),
    }
    kind, module = scheme(tensors), Module("m", 6, 160, tensors)
    form, tensors = kind.format(module), kind.read(module)
    assert form == Format("fp8", 128, torch.float32)
    assert torch.equal(unpack(pack(tensors, form).weight), dequantise(tensors, form))


def test_mxfp4_with_scales_of_their_own_dtype(plain, tmp_path):
    """Not bytes, as released checkpoints have them."""
    quantised, twin = write_quantised(plain, tmp_path, "mxfp4")
    tensors = load_file(quantised / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            tensors[name] = tensor.view(torch.float8_e8m0fnu)
    save_file(tensors, quantised / "model.safetensors")
    check(quantised, twin)


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


# for an engine's own kernels ----------------------------------------------------------------------


def plain_in(folder: Path) -> frozenset[str]:
    config = Qwen3NextConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return plain_modules_of(folder, config)


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq", "awq", "packed_4-bit"])
def test_modules_that_are_not_quantised_are_read_from_the_files(plain, tmp_path, kind):
    """Whatever config.json names: here neither the MTP layer nor what an engine stacks."""
    left_out = r"^mtp|in_proj_ba|layers\.1\..*(qkvz|out)|layers\.3\..*[qkv]_proj"
    quantised, _ = write_quantised(plain, tmp_path, kind, leave_out=left_out)
    found = plain_in(quantised)
    assert {"mtp.fc", "mtp.layers.0.mlp.experts", "mtp.layers.0.self_attn.qkv_proj"} <= found
    assert {f"model.layers.{i}.mlp.gate" for i in range(4)} <= found
    assert {"model.layers.3.self_attn.qkv_proj", "model.layers.1.linear_attn.out_proj"} <= found
    assert "model.layers.0.linear_attn.out_proj" not in found
    assert "model.layers.3.self_attn.o_proj" not in found
    assert not any(name.startswith("model") and name.endswith("experts") for name in found)


def test_scales_of_the_kv_cache_quantise_no_projection(plain, tmp_path):
    """NVFP4 experts alone, as released."""
    folder = Path(shutil.copytree(plain, tmp_path / "nvfp4"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp.experts." in name]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_2"] = torch.ones(())
    tensors["model.layers.3.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors")
    found = plain_in(folder)
    assert "model.layers.3.self_attn.qkv_proj" in found
    assert not any(name.endswith("experts") for name in found)


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (
            r"layers\.3.*q_proj",
            r"self_attn\.qkv_proj: .*[kv]_proj is quantised, and .*q_proj is not",
        ),
        (r"experts\.1\.down", r"mlp\.experts: .* is quantised, and .*experts\.1\.down_proj is not"),
    ],
)
def test_parts_that_are_not_alike_are_refused_by_name(plain, tmp_path, left_out, named):
    quantised, _ = write_quantised(plain, tmp_path, "fp8-blocks", leave_out=left_out)
    with pytest.raises(CheckpointError, match=named):
        plain_in(quantised)


# quantised as they load --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps"), [("int8", 0.51), ("int4", 4)])
def test_plain_weights_are_rounded(plain, name, steps):
    """int4 clips the largest."""
    formats, found = load(plain, name)
    config = Qwen3NextConfig.from_hf(json.loads((plain / "config.json").read_text()))
    sizes = quantised_bytes(name, all_tensors(config))
    stored = load_file(plain / "model.safetensors")
    for module, kept in formats.stored.items():
        form = kept.format
        assert form.encoding == ("int8" if ".self_attn." in module else name)
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
    assert ("full attention's projections are int8" in said) == (name == "int4")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_output_head_is_int8(plain, monkeypatch, name):
    assert not plain_as_int8(None)
    assert plain_as_int8(load(plain, name)[0])
    head = pack_plain(weight := torch.randn(50, 160).bfloat16(), as_int8=True)
    assert head.encoding == "int8"
    shapes = {"model.embed_tokens.weight": (50, 160)}
    assert quantised_bytes(name, shapes) == {"lm_head.weight": 50 * 160 + 50 * 4}
    step = weight.float().abs().amax(1) / 127
    error = (unpack(head.weight) - weight.float()).abs().amax(1)
    assert (error <= 0.51 * step).all()
    monkeypatch.setenv("QWEN3NEXT_HEAD", "plain")
    formats = load(plain, name)[0]
    assert not plain_as_int8(formats)
    assert quantised_bytes(name, shapes) == {}
    assert "; output head, embeddings," in formats.described()


def test_what_is_quantised_is_not_quantised_again(plain):
    with pytest.raises(CheckpointError, match=r"QWEN3NEXT_QUANTISE=int8: .* quantised already"):
        load(plain, "int8", quantization_config={"quant_method": "fp8"})


def test_headers_are_read_once_also_if_vllm_adds_fields(plain, tmp_path):
    folder, _ = write_quantised(plain, tmp_path, "packed_4-bit")
    config = AutoConfig.from_pretrained(folder)
    formats = read_formats(folder, config, config.quantization_config)
    config.quantization_config["total_num_heads"] = config.num_attention_heads
    assert read_formats(folder, config, config.quantization_config) is formats


def test_a_folder_that_is_written_anew_is_read_anew(plain, tmp_path):
    found = []
    for kind in ("fp8-rows", "int8-rows"):
        folder, _ = write_quantised(plain, tmp_path, kind)
        config = AutoConfig.from_pretrained(folder)
        found.append(read_formats(folder, config, config.quantization_config))
        for each in tmp_path.iterdir():
            shutil.rmtree(each)
    assert [formats.format_of(Q).encoding for formats in found] == ["fp8", "int8"]


OTHERS = {  # served, other weights with the same names and what is said of them
    "groups": ("packed_4-bit", "packed_4-bit_wide", "scales of whole channels .* of 32 columns"),
    "fp8 for int8": ("int8-rows", "fp8-rows", "is in fp8 .* served in int8"),
    "int8 for fp8": ("fp8-rows", "int8-rows", "is in int8 .* served in fp8"),
}


@pytest.mark.parametrize(("served", "other", "said"), OTHERS.values(), ids=OTHERS)
def test_other_weights_in_another_format_are_refused_by_headers(
    plain, tmp_path, monkeypatch, served, other, said
):
    wide = KINDS["packed_4-bit"]._replace(quantise=packed(4, 0))
    monkeypatch.setitem(quantised.KINDS, "packed_4-bit_wide", wide)
    formats, _ = load(write_quantised(plain, tmp_path / "served", served)[0])
    folder, _ = write_quantised(plain, tmp_path / "other", other)
    config = Qwen3NextConfig.from_hf(read_config(folder))
    with pytest.raises(CheckpointError, match=said):
        check_stored(folder, config, quantised=False, formats=formats, with_mtp=True)


def test_a_shape_that_does_not_fit_is_refused_by_headers_also_where_it_is_quantised_at_load(
    plain, tmp_path
):
    formats, _ = load(plain, "int8")
    config = Qwen3NextConfig.from_hf(read_config(plain))
    folder = Path(shutil.copytree(plain, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q}: weight has shape \(8, 160\)"):
        check_stored(folder, config, quantised=False, formats=formats, with_mtp=True)


def test_weights_in_gptqs_other_version_are_refused(plain, tmp_path):
    formats, _ = load(write_quantised(plain, tmp_path / "first", "gptq_zeros")[0])
    second, _ = write_quantised(plain, tmp_path / "second", "gptq_v2")
    check_version(tmp_path / "first" / "quantised", formats)
    check_version(plain, None)
    with pytest.raises(CheckpointError, match="checkpoint_format is not that of the served"):
        check_version(second, formats)


@pytest.mark.parametrize("names", [("weight",), ("qweight", "qzeros", "scales")])
def test_a_stored_head_that_is_tied_is_left_out(tmp_path, names):
    folder = write_checkpoint(tmp_path / "tied", **PLAIN | {"tie_word_embeddings": True})
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {f"lm_head.{name}": torch.zeros(8, 8) for name in names},
        folder / "model.safetensors",
    )
    formats, found = load(folder, "int8")
    config = Qwen3NextConfig.from_hf(read_config(folder))
    check_stored(folder, config, quantised=False, formats=formats, with_mtp=True)
    assert not any(name.startswith("lm_head") for name in found)
    out = pack_checkpoint(folder, tmp_path / "out", "int8")
    assert any("lm_head.packed" in load_file(path) for path in out.glob("*.safetensors"))


def test_a_head_is_dequantised_in_runs_of_channels(monkeypatch):
    form = Format("int4", 32, torch.bfloat16)
    tensors = quantise(torch.randn(7, 64), form)
    whole = dequantise(tensors, form)
    monkeypatch.setattr(format_module, "CHUNK", 128)
    assert torch.equal(dequantise(tensors, form), whole)


def test_config_that_is_not_of_the_files(plain):
    with pytest.raises(CheckpointError, match="no tensor of the files is quantised"):
        load(plain, quantization_config={"quant_method": "fp8"})
