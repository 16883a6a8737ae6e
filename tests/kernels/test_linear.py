"""Quantised linear layers: packing, the equation, and bits that no other row changes."""

from dataclasses import replace

import pytest
import torch

from qwen3next_plugin.kernels.linear import (
    concatenate,
    linear,
    pack_fp8,
    pack_int4,
    pack_int8,
    stack,
    unpack,
)
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# format, group, dtype of the scales, zero points
KINDS = {
    "int8": ("int8", 0, torch.float32, False),
    "int8-group-64-bf16": ("int8", 64, torch.bfloat16, False),
    "int8-group-128": ("int8", 128, torch.float32, False),
    "int4-fp16": ("int4", 0, torch.float16, True),
    "int4-group-32-zero-fp16": ("int4", 32, torch.float16, True),
    "int4-group-64-bf16": ("int4", 64, torch.bfloat16, False),
    "int4-group-128-zero": ("int4", 128, torch.float32, True),
    "fp8-rows-bf16": ("fp8", 0, torch.bfloat16, False),
    "fp8-blocks": ("fp8", 128, torch.float32, False),
}
PACK = {"int8": pack_int8, "int4": pack_int4, "fp8": pack_fp8}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def columns(kind, K):
    """K, or the next multiple of the group where that must divide it."""
    format, group, *_ = KINDS[kind]
    return K if format == "fp8" else -(-K // (group or 1)) * (group or 1)


def checkpoint(kind, *shape):
    """Tensors as a checkpoint has them; the matrix that they mean."""
    format, group, dtype, zeros = KINDS[kind]
    *lead, N, K = shape
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    groups = -(-K // (group or K))
    scale = ((torch.rand(*lead, N, groups) + 0.5) * 0.02).to(dtype)
    if format == "fp8":
        values = torch.where((values & 127) == 127, values - 1, values).view(torch.float8_e4m3fn)
        if group:
            scale = scale[..., ::128, :].contiguous()
        wide = scale.repeat_interleave(128, -2)[..., :N, :] if group else scale
        return {"values": values, "scale": scale}, values.float() * widened(wide, group, K)
    if format == "int8":
        values = values.view(torch.int8)
        return {"values": values, "scale": scale}, values.float() * widened(scale, group, K)
    values = values & 15
    if not zeros:
        return {"values": values, "scale": scale}, (values.float() - 8) * widened(scale, group, K)
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
    w = (values.float() - widened(zero, group, K)) * widened(scale, group, K)
    return {"values": values, "scale": scale, "zero": zero}, w


def widened(x, group, K):
    """An entry for each column."""
    return x.float().repeat_interleave(group or K, -1)[..., :K]


def packed(kind, *shape):
    tensors, w = checkpoint(kind, *shape)
    return PACK[KINDS[kind][0]](**tensors), w


@pytest.mark.parametrize("shape", [(1, 8), (16, 128), (37, 200), (3, 21, 130)], ids=str)
def test_unpacks_what_was_packed(kind, shape):
    shape = (*shape[:-1], columns(kind, shape[-1]))
    weight, w = packed(kind, *shape)
    assert weight.shape == shape
    assert torch.equal(unpack(weight), w)


def test_rows_of_several_and_experts(kind):
    K = columns(kind, 96)
    parts, matrices = zip(*(packed(kind, N, K) for N in (32, 5, 19, 16)), strict=True)
    assert torch.equal(unpack(concatenate(parts)), torch.cat(matrices))
    parts, matrices = zip(*(packed(kind, 21, K) for _ in range(3)), strict=True)
    experts = stack(parts)
    assert torch.equal(unpack(experts), torch.stack(matrices))
    assert torch.equal(unpack(experts.expert(1)), matrices[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 3, 33])
@pytest.mark.parametrize(("N", "K"), [(1, 8), (50, 200), (129, 515)])
def test_against_the_equation(cpu_backend, kind, M, N, K, dtype):
    K = columns(kind, K)
    weight, w = packed(kind, N, K)
    x = (torch.randn(M, K + 3) * torch.randn(K + 3).exp()).to(dtype)[:, :K]
    out = linear(x, weight)
    assert out.dtype == dtype
    assert_close("linear", dtype, out, x.double() @ w.double().T)


def test_refuses_what_is_no_weight():
    values, scale = torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 3)
    nibbles = values.view(torch.uint8)
    for pack, arguments, complaint in (
        (pack_int8, (nibbles, scale), r"values is torch\.uint8"),
        (pack_int8, (values, scale[:3]), "scale has shape"),
        (pack_int8, (values, scale[:, :2]), "2 scales for a row of 96"),
        (pack_int8, (values, scale.double()), r"scale is torch\.float64"),
        (pack_int8, (values, scale / 0), "scale is not finite"),
        (pack_int4, (nibbles + 16, scale), "values has 16; 4 bits"),
        (pack_int4, (nibbles, scale, nibbles[:, :3] + 17), "zero has 17; 4 bits"),
        (pack_int4, (nibbles, scale, nibbles[:, :2]), "zero is .*4, 2"),
        (pack_fp8, ((nibbles + 127).view(torch.float8_e4m3fn), scale), "values has NaN"),
        (pack_fp8, (nibbles.view(torch.float8_e4m3fn), scale), "scale has shape"),
    ):
        with pytest.raises(ValueError, match=rf"{pack.__name__}: .*{complaint}"):
            pack(*arguments)
    a, b = pack_int8(values, scale), pack_int8(values, scale[:, :1])
    with pytest.raises(ValueError, match="concatenate: format"):
        concatenate([a, b])
    with pytest.raises(ValueError, match="stack: shapes differ"):
        stack([a, pack_int8(values[:2], scale[:2])])


def test_refuses(cpu_backend):
    weight = pack_int8(torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 3))
    for x, w, complaint in (
        (torch.zeros(2, 96).double(), weight, r"x is torch\.float64"),
        (torch.zeros(2, 95), weight, "x has shape"),
        (torch.zeros(96, 96).T, weight, "not contiguous"),
        (torch.zeros(2, 96), stack([weight, weight]), "not 2 dims"),
        (
            torch.zeros(2, 96),
            replace(weight, packed=weight.packed[:, 1:]),
            "weight.packed has shape",
        ),
    ):
        with pytest.raises(ValueError, match=f"linear: .*{complaint}"):
            linear(x, w)
