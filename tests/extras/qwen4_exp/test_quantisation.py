"""Quantised checkpoints of Qwen4-Exp: each tensor's format is read from the files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.qwen4_exp_tiny import hashes
from extras.qwen4_exp.quantised import table_in_fp8, write_split
from model import packed
from model.weights import check, load
from quantised import KINDS, MIXED, pack_checkpoint, quantise, write_quantised
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.extras.command_line.sizes import tensor_bytes
from qwen3next_plugin.extras.qwen4_exp.ple import open_table
from qwen3next_plugin.extras.qwen4_exp.tensors import TABLE_SCALE
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.at_load import quantised_bytes
from qwen3next_plugin.model.quantisation.files import formats_of, plain_modules_of
from qwen3next_plugin.model.quantisation.packing import pack_plain
from tiers import long_except


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.mark.parametrize("kind", long_except((MIXED,), (*KINDS, MIXED)))
def test_beside_a_table_in_fp8(plain, tmp_path, kind):
    """Every projection, those of the n-grams, the indexer and the MTP head among them."""
    quantised, twin = write_quantised(plain, tmp_path, kind)
    table_in_fp8(quantised, twin)
    formats, found = load(quantised)
    assert not formats.dequantised
    for module in ("1.ple.key_proj", "1.ple.value_proj", "3.self_attn.indexer.index_qk_proj"):
        assert formats.of(f"model.layers.{module}"), module
    assert formats.of("mtp.layers.0.mlp.experts").keys() == {"w13", "w2"}
    assert formats.of("model.layers.0.attn_hyper_connection.input_mix_weight_up") is None
    assert not any(name.endswith(TABLE_SCALE) for name in found)
    check(quantised, twin)
    raw = json.loads((quantised / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    check_stored(quantised, config, quantised=False, formats=formats, with_mtp=True)
    plain_modules_of(quantised, config)


@pytest.mark.parametrize("kind", ["fp8-blocks", "nvfp4"])
def test_only_experts_and_table_are_quantised(plain, tmp_path, kind):
    """As it is released."""
    others = r"^(?!.*\.experts\.\d)"
    quantised, twin = write_quantised(plain, tmp_path, kind, leave_out=others)
    table_in_fp8(quantised, twin)
    check(quantised, twin)
    formats, _ = load(quantised)
    assert not formats.dequantised
    assert {name.rpartition(".")[2] for name in formats.stored} == {
        *("gate_proj", "up_proj", "down_proj")
    }


def test_packed_keeps_its_table(plain, tmp_path):
    """In FP8, with its scale; and hashes, which only transformers reads, are no vision tower."""
    quantised, twin = write_quantised(plain, tmp_path, "packed_4-bit")
    table_in_fp8(quantised, twin)
    raw = json.loads((quantised / "config.json").read_text())
    stored = load_file(quantised / "model.safetensors") | hashes(raw)
    save_file(stored, quantised / "model.safetensors")
    config = Qwen3NextConfig.from_hf(raw)
    assert formats_of(quantised, config, raw["quantization_config"], asked=None).tower is None
    out = pack_checkpoint(quantised, tmp_path / "out")
    for i in (1, 4):
        after, before = open_table(out, config, i), open_table(quantised, config, i)
        assert torch.equal(after.scale, before.scale)
        rows = torch.arange(before.shape[0])
        assert torch.equal(after.take(rows), before.take(rows))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stream_mixers_are_int8(plain, monkeypatch, name):
    """And take the bytes that are planned, with a rank that is padded."""
    formats, stored = load(plain, name)
    shapes = all_tensors(Qwen3NextConfig.from_hf(read_config(plain)))
    mixers = {n: t for n, t in stored.items() if ".input_mix_weight_" in n}
    planned = quantised_bytes(name, shapes)
    assert mixers.keys() < planned.keys()
    in_int8 = {n: pack_plain(weight, as_int8=True).weight for n, weight in mixers.items()}
    assert all(planned[n] == weight.nbytes for n, weight in in_int8.items())
    assert any(
        weight.nbytes > weight.shape[0] * (weight.shape[1] + 4) for weight in in_int8.values()
    )
    assert "; the output head is int8; stream mixers are int8; embeddings," in formats.described()
    monkeypatch.setenv("QWEN3NEXT_HEAD", "plain")
    assert not mixers.keys() & quantised_bytes(name, shapes).keys()
    assert "; output head, stream mixers, embeddings," in load(plain, name)[0].described()


def test_packed_stream_mixers(tmp_path, monkeypatch):
    quantised, _, twin = quantise(write_split(tmp_path / "plain"), tmp_path, "packed_4-bit")
    out = pack_checkpoint(quantised, tmp_path / "out")
    packed.check(out, twin)
    packed.check_packed(out)
    config, formats = packed.opened(out)
    mixers = {f"{name}.weight" for name in formats.packed_plain - {"lm_head"}}
    assert mixers == {n for n in all_tensors(config) if ".input_mix_weight_" in n}
    sizes, _ = tensor_bytes(out, config, "float32", asked=None)
    assert sizes == tensor_bytes(quantised, config, "float32", asked=None)[0]
    monkeypatch.setenv("QWEN3NEXT_MMAP", "1")
    sizes, source = tensor_bytes(out, config, "float32", asked=None)
    assert not any(sizes[name] for name in mixers)
    assert "int8" not in source
