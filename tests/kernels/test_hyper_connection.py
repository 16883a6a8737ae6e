"""Hyper-connections: transformers' module, packed weights, bits that depend on a token alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextGatedResidual

from qwen3next_plugin.kernels.draft_head import quantise_channels
from qwen3next_plugin.kernels.hyper_connection import HyperConnectionWeights, hyper_connection
from qwen3next_plugin.kernels.linear import (
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    quantise_int4,
    unpack,
)
from tolerances import assert_close

OP, EPS = "hyper_connection", 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(4, 48, 24), (3, 17, 5), (2, 80, 33)]  # hc, D, L
KINDS = ("bf16", "int8", "int4", "fp8")


class Connection:
    """Random weights, transformers' module with them, and inputs."""

    def __init__(self, hc: int, D: int, L: int, dtype: torch.dtype, *, final: bool = False):
        config = SimpleNamespace(hc_count=hc, hidden_size=D, hc_lowrank=L, rms_norm_eps=EPS)
        self.module = Qwen4ExpTextGatedResidual(config, use_combine=not final).requires_grad_(False)
        for weight in self.module.parameters():
            weight.copy_((torch.randn(weight.shape) / weight.shape[-1] ** 0.5).to(dtype))
        self.module.hc_norm.weight.normal_()
        down, up, inject = (
            None if layer is None else layer.weight.to(dtype)
            for layer in (
                self.module.input_mix_weight_down,
                self.module.input_mix_weight_up,
                self.module.block_inject_weight,
            )
        )
        self.weights = HyperConnectionWeights(self.module.hc_norm.weight.data, down, up, inject)
        self.hc, self.D, self.dtype = hc, D, dtype

    def streams(self, T: int) -> Tensor:
        """Streams with gaps between the tokens."""
        return torch.randn(T, self.hc + 1, self.D).to(self.dtype)[:, : self.hc]

    def block(self, T: int) -> Tensor:
        return torch.randn(T, self.D + 3).to(self.dtype)[:, : self.D]

    def __call__(self, streams_: Tensor, **given) -> tuple[Tensor, Tensor]:
        given = {"weights": self.weights, **given}
        return hyper_connection(streams_=streams_, eps=EPS, **given)


def packed(weight: Tensor, kind: str):
    weight = weight.bfloat16()
    if kind == "bf16":
        return pack_bf16(weight)
    if kind == "int8":
        values, scale = quantise_channels(weight)
        return pack_int8(values, scale[:, None])
    if kind == "int4":
        return pack_int4(*quantise_int4(weight.float(), 32, torch.float32))
    scale = weight.float().abs().amax(-1, keepdim=True) / 448
    return pack_fp8((weight / scale).to(torch.float8_e4m3fn), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize(("hc", "D", "L"), SIZES)
def test_against_the_model(cpu_backend, T, hc, D, L, dtype):
    """As a decoder layer injects a block's output and mixes the streams for the next block."""
    ours = Connection(hc, D, L, dtype)
    streams, block, injection = ours.streams(T), ours.block(T), 2 * torch.rand(T, hc)
    expected = streams.float() + injection[:, :, None] * block.float()[:, None]
    mixed, following = ours(streams, block=block, injection=injection)
    assert_close(OP, dtype, streams, expected)
    theirs, _, their_injection = ours.module(streams.float().flatten(1))
    assert (mixed.dtype, mixed.shape, following.dtype) == (dtype, (T, D), torch.float32)
    assert mixed.is_contiguous()
    assert_close(OP, dtype, mixed, theirs)
    assert_close(OP, dtype, following, their_injection)


@pytest.mark.parametrize("kind", [None, "bf16"])
def test_no_tokens(cpu_backend, kind):
    ours = Connection(4, 48, 24, torch.bfloat16)
    norm, down, up, inject = ours.weights
    if kind:
        down, up = packed(down, kind), packed(up, kind)
    weights = HyperConnectionWeights(norm, down, up, inject)
    outs = ours(ours.streams(0), weights=weights, block=ours.block(0), injection=torch.rand(0, 4))
    assert [out.shape for out in outs] == [(0, 48), (0, 4)]


def test_final_mixer(cpu_backend):
    ours = Connection(4, 48, 24, torch.float32, final=True)
    streams = ours.streams(5)
    before = streams.clone()
    mixed, following = ours(streams)
    assert_close(OP, torch.float32, mixed, ours.module(streams.flatten(1)))
    assert following.shape == (5, 0)
    assert torch.equal(streams, before)


def test_embedding_into_zeros(cpu_backend):
    """Without weights a block's output is added to every stream as it is."""
    ours = Connection(4, 48, 24, torch.bfloat16)
    streams, embedding = torch.zeros(3, 4, 48, dtype=torch.bfloat16), ours.block(3)
    mixed, _ = ours(streams, block=embedding)
    assert torch.equal(streams, embedding[:, None].expand(3, 4, 48))
    again, _ = ours(streams)
    assert torch.equal(mixed, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize(("hc", "D", "L"), [(4, 48, 32), (2, 80, 64), (3, 32, 160)])
def test_packed(cpu_backend, T, hc, D, L, dtype, kind):
    """As with the values that the packed weights stand for."""
    ours = Connection(hc, D, L, dtype)
    norm, down, up, inject = ours.weights
    weights = HyperConnectionWeights(norm, packed(down, kind), packed(up, kind), inject)
    ours.module.input_mix_weight_down.weight.copy_(unpack(weights.down))
    ours.module.input_mix_weight_up.weight.copy_(unpack(weights.up))
    streams = ours.streams(T)
    mixed, following = ours(streams, weights=weights)
    theirs, _, their_injection = ours.module(streams.float().flatten(1))
    assert_close(OP, dtype, mixed, theirs)
    assert_close(OP, dtype, following, their_injection)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_batch(bits_level, dtype, kind):
    ours = Connection(4, 80, 64, dtype)
    if kind:
        norm, down, up, inject = ours.weights
        weights = HyperConnectionWeights(norm, packed(down, kind), packed(up, kind), inject)
        ours.weights = weights
    T = 300
    streams, block, injection = ours.streams(T), ours.block(T), torch.rand(T, 4)
    before = streams.clone()
    whole = ours(streams, block=block, injection=injection)
    for begin, end in ((0, 1), (1, 2), (7, 12), (250, 299), (299, 300)):
        part = before[begin:end].clone()
        outs = ours(part, block=block[begin:end], injection=injection[begin:end])
        assert torch.equal(part, streams[begin:end])
        for ours_of_part, of_all in zip(outs, whole, strict=True):
            assert torch.equal(ours_of_part, of_all[begin:end])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"streams_": torch.zeros(2, 192)}, r"streams_ has shape \(2, 192\), not 3 dims"),
        ({"streams_": torch.zeros(2, 4, 48, dtype=torch.float64)}, r"streams_ is torch\.float64"),
        ({"streams_": torch.zeros(2, 48, 4).transpose(1, 2)}, "last dim of streams_"),
        ({"block": torch.zeros(3, 48)}, r"block has shape \(3, 48\), not \(2, 48\)"),
        ({"injection": torch.zeros(2, 4)}, "injection is given, but no block"),
        (
            {"block": torch.zeros(2, 48), "injection": torch.zeros(2, 4).bfloat16()},
            r"injection is torch\.bfloat16",
        ),
        ({"norm": torch.zeros(48)}, "norm has shape"),
        ({"down": torch.zeros(24, 191)}, "down has shape"),
        ({"down": torch.zeros(24, 192).bfloat16()}, r"down is torch\.bfloat16"),
        ({"up": torch.zeros(192, 23)}, "up has shape"),
        ({"up": pack_bf16(torch.zeros(192, 24).bfloat16())}, "one of down and up is packed"),
        ({"inject": torch.zeros(3, 192)}, "inject has shape"),
    ],
)
def test_refuses(cpu_backend, change, complaint):
    weights = Connection(4, 48, 24, torch.float32).weights
    fields = {name: change[name] for name in weights._fields if name in change}
    change = {name: value for name, value in change.items() if name not in fields}
    arguments = {"streams_": torch.zeros(2, 4, 48), "weights": weights._replace(**fields)}
    with pytest.raises(ValueError, match=f"hyper_connection: .*{complaint}"):
        hyper_connection(**{**arguments, **change}, eps=EPS)


def test_refuses_packed_features_between_panels(cpu_backend):
    ours = Connection(3, 24, 16, torch.bfloat16)
    norm, down, up, inject = ours.weights
    weights = HyperConnectionWeights(norm, pack_bf16(down), pack_bf16(up), inject)
    with pytest.raises(ValueError, match="24 features, no multiple of 16"):
        ours(ours.streams(1), weights=weights)
