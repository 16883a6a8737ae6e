"""Stream mixers: their weights are packed as the output head is."""

from types import SimpleNamespace as Bag

import pytest
import torch

from qwen3next_plugin.extras.qwen4_exp.hyper_connection import HyperConnection
from qwen3next_plugin.extras.qwen4_exp.mixing import MixingMethod, MixingWeight, use_packing
from qwen3next_plugin.model.quantisation.layers import Ranks
from qwen3next_plugin.model.quantisation.modules import Formats


@pytest.mark.parametrize(
    ("case", "encoding"),
    [
        ("bf16", "bf16"),
        ("bf16, drafting", "int8"),
        ("bf16, quantised", "int8"),
        ("bf16, quantised, as stored", "bf16"),
        ("bf16, narrow", None),
        ("fp32", None),
        ("fp32, drafting", None),
        ("fp32, quantised", "int8"),
    ],
)
def test_what_mixes_streams_is_packed_as_the_head_is(monkeypatch, case, encoding):
    """In bf16, or as int8 where it drafts or the rest is quantised; a stream must fill panels."""
    monkeypatch.setattr("qwen3next_plugin.kernels.native.levels", lambda: ["avx512bf16"])
    monkeypatch.setenv("QWEN3NEXT_HEAD", "plain" if "as stored" in case else "auto")
    dtype = torch.float32 if "fp32" in case else torch.bfloat16
    D, hc, T = 40 if "narrow" in case else 48, 2, 3
    config = Bag(hidden_size=D, hc_count=hc, hc_lowrank=24, rms_norm_eps=1e-6)
    connection = HyperConnection(config, "model.hyper_connection_mixer").to(dtype)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=D**-0.5)
    streams, block = torch.randn(T, hc, D).to(dtype), torch.randn(T, D).to(dtype)
    want = connection(streams.clone(), block)
    formats = Formats({}, {}, str) if "quantised" in case else None
    use_packing(connection, formats, object, drafting="drafting" in case)
    matrices = connection.input_mix_weight_down, connection.input_mix_weight_up
    for matrix in matrices:
        if method := getattr(matrix, "quant_method", None):
            method.process_weights_after_loading(matrix)
            method.process_weights_after_loading(matrix)
    assert [m.packed and m.packed.encoding for m in matrices] == [encoding] * 2
    if encoding == "int8":  # as the files may have it
        down, _ = matrices
        attached = MixingWeight(down.name, *down.weight.shape, config=config)
        method = MixingMethod(down.name, as_int8=True)
        method.attach(attached, down.name, down.packed.weight, Ranks(1, 2))
        method.process_weights_after_loading(attached)
        assert torch.equal(attached.value.packed, down.value.packed)
        assert attached.value.shape == (24, hc * D)
        assert not attached.weight.numel()
    assert all(bool(m.weight.numel()) == (encoding is None) for m in matrices)
    for got, as_plain in zip(connection(streams, block), want, strict=True):
        assert (got - as_plain).norm() / as_plain.norm() < 0.02
