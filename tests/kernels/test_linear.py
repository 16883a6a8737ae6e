"""Packed linear layers: packing, the equation, and bits that no other row changes."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear import (
    linear,
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_mxfp4,
    pack_nvfp4,
    stack,
    unpack,
)
from qwen3next_plugin.kernels.linear.packed_weight import joined
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# encoding, group, dtype of the scales, zero points
KINDS = {
    "int8": ("int8", 0, torch.float32, False),
    "int8-group-32-bf16": ("int8", 32, torch.bfloat16, False),
    "int8-group-64-bf16": ("int8", 64, torch.bfloat16, False),
    "int8-group-128": ("int8", 128, torch.float32, False),
    "int4-fp16": ("int4", 0, torch.float16, True),
    "int4-group-32-zero-fp16": ("int4", 32, torch.float16, True),
    "int4-group-64-bf16": ("int4", 64, torch.bfloat16, False),
    "int4-group-128-zero": ("int4", 128, torch.float32, True),
    "fp8-rows-bf16": ("fp8", 0, torch.bfloat16, False),
    "fp8-blocks": ("fp8", 128, torch.float32, False),
    "bf16": ("bf16", 0, torch.float32, False),
    "nvfp4": ("nvfp4", 16, torch.float8_e4m3fn, False),
    "mxfp4": ("mxfp4", 32, torch.float8_e8m0fnu, False),
}
PACK = {
    "int8": pack_int8,
    "int4": pack_int4,
    "fp8": pack_fp8,
    "bf16": pack_bf16,
    "nvfp4": pack_nvfp4,
    "mxfp4": pack_mxfp4,
}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]  # by code


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def columns(kind, K):
    """K, or the next multiple of the group where that must divide it, of 2 in int4."""
    encoding, group, *_ = KINDS[kind]
    unit = {"int8": group or 1, "int4": group or 2, "nvfp4": 16, "mxfp4": 32}.get(encoding, 1)
    return -(-K // unit) * unit


def checkpoint(kind, *shape):
    """Tensors as a checkpoint has them; the matrix that they mean."""
    encoding, group, dtype, zeros = KINDS[kind]
    if encoding == "bf16":
        values = torch.randn(shape).bfloat16()
        return {"values": values}, values.float()
    *lead, N, K = shape
    values = torch.randint(0, 256, shape, dtype=torch.uint8)
    groups = -(-K // (group or K))
    if encoding.endswith("fp4"):
        return fp4_checkpoint(encoding, values & 15, (*lead, N, groups))
    unit = 0.002 if encoding == "fp8" else 0.02
    scale = ((torch.rand(*lead, N, groups) + 0.5) * unit).to(dtype)
    if encoding == "fp8":
        values = torch.where((values & 127) == 127, values - 1, values).view(torch.float8_e4m3fn)
        if group:
            scale = scale[..., ::128, :].contiguous()
        wide = scale.repeat_interleave(128, -2)[..., :N, :] if group else scale
        return {"values": values, "scale": scale}, values.float() * widened(wide, group, K)
    if encoding == "int8":
        values = values.view(torch.int8)
        return {"values": values, "scale": scale}, values.float() * widened(scale, group, K)
    values = values & 15
    stored = {"values": joined(values), "scale": scale}
    if not zeros:
        return stored, (values.float() - 8) * widened(scale, group, K)
    zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
    w = (values.float() - widened(zero, group, K)) * widened(scale, group, K)
    return stored | {"zero": zero}, w


def fp4_checkpoint(encoding, codes, shape):
    """Scales are within a factor of 128, and on both sides of the smallest normal one of e4m3."""
    stored = {"values": joined(codes)}
    values = torch.tensor(E2M1)[codes.long()]
    if encoding == "mxfp4":
        scale = torch.randint(119, 124, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        return stored | {"scale": scale}, values * widened(scale, 32, values.shape[-1])
    scale = torch.randint(1, 40, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    whole = torch.rand(*shape[:-1], 1) + 0.5
    w = values * widened(scale.float() * whole, 16, values.shape[-1])
    return stored | {"scale": scale, "channel_scale": whole}, w


def widened(x, group, K):
    """An entry for each column."""
    return x.float().repeat_interleave(group or K, -1)[..., :K]


def pack(kind, tensors):
    return PACK[KINDS[kind][0]](**tensors)


def packed(kind, *shape):
    tensors, w = checkpoint(kind, *shape)
    return pack(kind, tensors), w


@pytest.mark.parametrize("shape", [(1, 8), (16, 128), (37, 200), (3, 21, 130)], ids=str)
def test_unpacks_what_was_packed(kind, shape):
    shape = (*shape[:-1], columns(kind, shape[-1]))
    weight, w = packed(kind, *shape)
    assert weight.shape == shape
    assert torch.equal(unpack(weight), w)


def test_native_packing_is_the_reference(native_level, kind, monkeypatch):
    for shape in ((1, 8), (50, 200), (129, 515), (3, 21, 130), (0, 64)):
        tensors, _ = checkpoint(kind, *shape[:-1], columns(kind, shape[-1]))
        monkeypatch.setenv("QWEN3NEXT_KERNELS", "auto")
        packed = pack(kind, tensors)
        monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
        assert torch.equal(packed.packed, pack(kind, tensors).packed)


def test_experts(kind):
    parts, matrices = zip(*(packed(kind, 21, columns(kind, 96)) for _ in range(3)), strict=True)
    assert torch.equal(unpack(stack(iter(parts), 3)), torch.stack(matrices))


def test_many_rows_have_the_bits_of_few(kind):
    """More rows and panels than one task takes."""
    weight, _ = packed(kind, 300, columns(kind, 1100))
    x = torch.randn(1100, weight.shape[1]).bfloat16()
    whole = linear(x, weight)
    for begin, end in ((0, 1), (500, 530), (1000, 1100)):
        assert torch.equal(linear(x[begin:end], weight), whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_equation(cpu_backend, kind, dtype):
    for N, K in ((1, 8), (50, 200), (129, 515)):
        K = columns(kind, K)
        weight, w = packed(kind, N, K)
        for M in (0, 1, 3, 33):
            x = (torch.randn(M, K + 3) * torch.randn(K + 3).exp()).to(dtype)[:, :K]
            out = linear(x, weight)
            assert out.dtype == dtype
            exact = x.double() @ w.double().T
            assert_close("linear", dtype, out, exact)
            in_fp32 = linear(x, weight, out_dtype=torch.float32)
            assert torch.equal(in_fp32.to(dtype), out)  # the same sums, not rounded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("first", "stride"), [(0, 512), (0, 514), (1, 514), (0, 513)])
def test_x_may_lie_anywhere(native_level, kind, dtype, first, stride):
    """At even and odd addresses, and distances between rows; K needs no padding."""
    weight, _ = packed(kind, 50, 512)
    x = torch.randn(9, stride).to(dtype)[:, first : first + 512]
    assert torch.equal(linear(x, weight), linear(x.clone(), weight))


def rows(tensors, begin, end):
    """Those of a weight; a scale of a block of rows belongs to all of them."""
    return {n: t[begin:end] if len(t) > 1 else t for n, t in tensors.items()}


def in_parts(x, weight):
    """The layer on rows in passes of other sizes, some of them alone."""
    bounds = itertools.accumulate((1, 1, 2, 3, 5, 9, 17), initial=0)
    pairs = itertools.pairwise((*bounds, len(x)))
    return torch.cat([linear(x[a:b], weight) for a, b in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_rows_share_the_batch(native_level, kind, dtype):
    """A row has the same bits alone, in any batch, on one thread, and in parts of the weight."""
    K = columns(kind, 645)
    tensors, _ = checkpoint(kind, 65, K)
    weight, x = pack(kind, tensors), torch.randn(70, K).to(dtype)
    parts = [pack(kind, rows(tensors, *ends)) for ends in ((0, 16), (16, 56), (56, 65))]
    whole = linear(x, weight)
    assert torch.equal(in_parts(x, weight), whole)
    assert torch.equal(torch.cat([linear(x, part) for part in parts], 1), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@given(
    M=st.integers(1, 300),
    N=st.integers(1, 70),
    K=st.integers(1, 700),
    kind=st.sampled_from([*KINDS]),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_and_split(M, N, K, kind):
    K = columns(kind, K)
    weight, w = packed(kind, N, K)
    x = torch.randn(M, K)
    out = linear(x, weight)
    assert_close("linear", torch.float32, out, x.double() @ w.double().T)
    assert torch.equal(torch.cat([linear(x[: M // 3], weight), linear(x[M // 3 :], weight)]), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [name for name in KINDS if name[:3] not in ("fp8", "bf1")])
def test_integers_have_the_same_bits_at_every_instruction_set(kind, dtype):
    before = native.isa()
    for K in (columns(kind, 645), 1024):  # blocks of 256 and 512 where scales are by row
        weight, x, outs = packed(kind, 37, K)[0], torch.randn(19, K).to(dtype), []
        try:
            for level in native.levels():
                native.set_isa(level)
                outs.append(linear(x, weight))
        finally:
            native.set_isa(before)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_the_largest_integers(native_level, rows, dtype):
    """All mantissa bits, and the smallest weights: no sum of a block overflows."""
    weight = pack_int8(torch.full((40, 1024), -128, dtype=torch.int8), torch.full((40, 1), 2**-7))
    x = torch.full((rows, 1024), 2 - torch.finfo(dtype).eps, dtype=dtype)
    x[:, 512::3] *= -1
    assert torch.equal(linear(x, weight), (x.float() @ unpack(weight).T).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-60, 1e-3, 1.0, 2.0**15])
def test_activations_keep_their_precision(native_level, dtype, scale):
    """bf16 is exact down to 1/128 of a block's largest; fp16 keeps 15 bits of that, fp32 28."""
    weight = pack_int8(torch.eye(128, dtype=torch.int8), torch.ones(128, 1))
    x = ((torch.rand(50, 128) * 126 / 128 + 1 / 127) * scale).to(dtype)
    x[:, 7] = scale * (1.99 if dtype == torch.float16 else 1)
    out = linear(x, weight)
    if dtype == torch.bfloat16:
        assert torch.equal(out, x)
    unit = x.double().amax(1, keepdim=True) * 2.0 ** (-27 if dtype == torch.float32 else -15)
    assert ((out.double() - x.double()).abs() <= unit).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_leaves_the_others(native_level, kind, value):
    weight, w = packed(kind, 20, columns(kind, 150))
    x = torch.randn(5, w.shape[1])
    clean = linear(x, weight)
    x[2, 140] = value
    out = linear(x, weight)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_value_of_fp8(native_level, dtype):
    """Subnormals and zeros, also where the thread flushes denormals."""
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn)[:, None]
    weight = pack_fp8(values, torch.ones(2, 1))
    torch.set_flush_denormal(True)
    try:
        out = linear(torch.ones(1, 1, dtype=dtype), weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out[0], values[:, 0].to(dtype))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_every_value_and_scale_of_fp4(native_level, kind):
    """Also where the thread flushes denormals; the largest powers of two would overflow."""
    encoding, group, dtype, _ = KINDS[kind]
    scale = torch.arange(127 if kind == "nvfp4" else 200, dtype=torch.uint8).view(dtype)[:, None]
    codes = torch.arange(group, dtype=torch.uint8).expand(len(scale), -1) & 15
    whole = {"channel_scale": torch.full((len(scale), 1), -3.0)} if kind == "nvfp4" else {}
    weight = PACK[encoding](joined(codes), scale, **whole)
    torch.set_flush_denormal(True)
    try:
        out = linear(torch.eye(group), weight)
    finally:
        torch.set_flush_denormal(False)
    expected = torch.tensor(E2M1)[codes.long()] * scale.float()
    assert torch.equal(out, expected.T * (-3.0 if whole else 1))


def test_refuses_what_is_no_weight():
    values, scale = torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 3)
    nibbles = values.view(torch.uint8)
    e4m3, nan = (torch.full((4, 12), x).to(torch.float8_e4m3fn) for x in (1.0, torch.nan))
    for pack, arguments, complaint in (
        (pack_int8, (nibbles, scale), r"values is torch\.uint8"),
        (pack_int8, (values, scale[:3]), "scale has shape"),
        (pack_int8, (values, scale[:, :2]), "2 scales for 96 columns"),
        (pack_int8, (values, scale.double()), r"scale is torch\.float64"),
        (pack_int8, (values, scale / 0), "scale is not finite"),
        (pack_int4, (nibbles[:, ::2], scale, nibbles[:, :3] + 17), "zero has 17; 4 bits"),
        (pack_int4, (nibbles[:, ::2], scale, nibbles[:, :2]), "zero is .*4, 2"),
        (pack_fp8, ((nibbles + 127).view(torch.float8_e4m3fn), scale[:, :1]), "values has NaN"),
        (pack_fp8, (nibbles.view(torch.float8_e4m3fn), scale), "scale has shape"),
        (pack_bf16, (scale,), r"values is torch\.float32"),
        (pack_nvfp4, (nibbles, e4m3[:, :11], scale[:, :1]), "scale is .*4, 11.* of each 16 of 192"),
        (pack_nvfp4, (nibbles, scale, scale[:, :1]), r"scale is torch\.float32"),
        (pack_nvfp4, (nibbles, e4m3, scale), r"channel_scale is torch\.float32 \(4, 3\)"),
        (pack_nvfp4, (nibbles, e4m3, scale[:, :1] / 0), "channel_scale is not finite"),
        (pack_nvfp4, (nibbles, nan, scale[:, :1]), "scale is negative, or not finite"),
        (pack_mxfp4, (nibbles, e4m3), r"scale is torch\.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=rf"{pack.__name__}: .*{complaint}"):
            pack(*arguments)
    a, b = pack_int8(values, scale), pack_int8(values, scale[:, :1])
    for other in (b, pack_int8(values[:2], scale[:2]), pack_int8(values, scale.half())):
        with pytest.raises(ValueError, match=r"stack: encoding, group, shape, .* of matrix 1, "):
            stack([a, other], 2)
    for n in (0, 1, 3):
        with pytest.raises(ValueError, match=f"stack: {n} matrices of 2 experts"):
            stack([a] * n, 2)


def test_refuses(cpu_backend):
    values = torch.zeros(4, 96, dtype=torch.int8)
    weight = pack_int8(values, torch.ones(4, 3))
    for x, w, complaint in (
        (torch.zeros(2, 96).double(), weight, r"x is torch\.float64"),
        (torch.zeros(2, 95), weight, "x has shape"),
        (torch.zeros(96, 96).T, weight, "not contiguous"),
        (torch.zeros(2, 96), stack([weight, weight], 2), "not 2 dims"),
        (
            torch.zeros(2, 96),
            replace(weight, packed=weight.packed[:, 1:]),
            "weight.packed has shape",
        ),
        (torch.zeros(96), weight, r"x has shape \(96,\), not 2 dims"),
        (torch.zeros(2, 96), replace(weight, group=1024), "weight is int8 in groups of 1024, not"),
        (torch.zeros(2, 0), pack_bf16(torch.zeros(4, 0).bfloat16()), r"\(4, 0\), no columns"),
        (
            torch.zeros(2, 96),
            replace(pack_bf16(values.bfloat16()), group=128),
            "weight is bf16 in groups of 128, not",
        ),
    ):
        with pytest.raises(ValueError, match=f"linear: .*{complaint}"):
            linear(x, w)


@pytest.mark.parametrize(
    ("kind", "part", "change", "complaint"),
    [
        ("int8", "scale", Tensor.double, r"weight\.scale is torch\.float64"),
        ("bf16", "packed", lambda x: x.view(torch.bfloat16), r"weight\.packed is torch\.bfloat16"),
        ("int4-group-128-zero", "zero", Tensor.int, r"weight\.zero is torch\.int32"),
        ("int4-group-128-zero", "zero", lambda x: x[:, :0], r"weight\.zero has shape"),
        ("int4-group-128-zero", "zero", lambda x: x.to("meta"), r"weight\.zero is on meta"),
    ],
)
def test_refuses_a_weight_with_other_parts(cpu_backend, kind, part, change, complaint):
    """As a module has them after `.double()`, say."""
    weight, _ = packed(kind, 20, 256)
    bad = replace(weight, **{part: change(getattr(weight, part))})
    with pytest.raises(ValueError, match=f"linear: {complaint}"):
        linear(torch.zeros(2, 256), bad)


def test_refuses_another_dtype_of_the_result():
    weight, _ = packed("int8", 20, 128)
    with pytest.raises(ValueError, match=r"linear: out_dtype is torch\.float16, not torch\.bfl"):
        linear(torch.zeros(2, 128).bfloat16(), weight, out_dtype=torch.float16)


@pytest.mark.parametrize("kind", ["int8", "fp8-blocks", "bf16"])
def test_refuses_zero_points_of_another_encoding(cpu_backend, kind):
    weight, _ = packed(kind, 20, 256)
    bad = replace(weight, zero=torch.zeros(weight.scale.shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"linear: weight is {kind[:4].rstrip('-')} with zero poi"):
        linear(torch.zeros(2, 256), bad)
