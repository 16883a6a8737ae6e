"""Rounding to int4: the reference's scales and values, on every instruction set with equal bits."""

import pytest
import torch

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear import pack_int4, quantise_int4, reference
from qwen3next_plugin.model.quantisation.format import nibbles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (32, 64, 128)


def dequantised(values, scale, group):
    return (nibbles(values).float() - 8) * scale.float().repeat_interleave(group, -1)


def heavy_tailed(N, K):
    weight = torch.randn(N, K)
    return 0.02 * weight * weight.abs()


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_against_the_reference(native_level, group, dtype, scale_dtype):
    """Sums round differently; beside a scale that is equal, so are all values."""
    weight = heavy_tailed(37, 5 * 128).to(dtype)
    values, scale = quantise_int4(weight, group, scale_dtype)
    expected, of_reference = reference.quantise_int4(weight, group, scale_dtype)
    assert (values.dtype, values.shape) == (expected.dtype, expected.shape)
    assert (scale.dtype, scale.shape) == (of_reference.dtype, of_reference.shape)
    ratio = scale.float() / of_reference.float()
    assert ((ratio - 1).abs() <= 1e-5).float().mean() > 0.99
    same = (scale == of_reference).repeat_interleave(group // 2, -1)
    assert torch.equal(values[same], expected[same])
    error, least = (
        (dequantised(*found, group) - weight.float()).square().sum()
        for found in ((values, scale), (expected, of_reference))
    )
    assert error <= 1.0001 * least


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_same_bits_at_every_instruction_set(group, dtype):
    weight, before, found = heavy_tailed(200, 5 * 128).to(dtype), native.isa(), []
    try:
        for level in native.levels():
            native.set_isa(level)
            found.append(quantise_int4(weight, group, torch.float32))
    finally:
        native.set_isa(before)
    assert all(torch.equal(values, found[0][0]) for values, _ in found)
    assert all(torch.equal(scale, found[0][1]) for _, scale in found)


def test_rows_do_not_depend_on_their_neighbours(native_level):
    """Nor on the number of threads, nor on strides."""
    weight = heavy_tailed(1000, 256).bfloat16()
    whole = quantise_int4(weight, 64, torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = quantise_int4(weight.T.contiguous().T, 64, torch.bfloat16)
    finally:
        torch.set_num_threads(threads)
    part = quantise_int4(weight[301:302], 64, torch.bfloat16)
    for one, other, row in zip(whole, again, part, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[301:302], row)
    assert quantise_int4(weight[:0], 64, torch.bfloat16)[0].shape == (0, 128)


@pytest.mark.parametrize("sign", [1, -1])
def test_halves_are_rounded_to_even(cpu_backend, sign):
    """Tried at 1.03 times a weight, the halves are rounded up, which the 2.25 make up for."""
    halves, even = [0.5, 1.5, 2.5, 3.5], [0, 2, 2, 4]
    others = [-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1, 0, -8, 7]
    weight = torch.tensor([*halves, *others, *[2.25] * 10])[None]
    values, scale = quantise_int4(sign * weight, 32, torch.float32)
    assert scale.item() == sign
    assert nibbles(values)[0].tolist() == [8 + q for q in (*even, *others, *[2] * 10)]


@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-9])
def test_a_group_of_nearly_zeros(native_level, value):
    weight = torch.cat([torch.full((3, 32), value), torch.randn(3, 32)], 1)
    found = quantise_int4(weight, 32, torch.bfloat16)
    assert found[1].isfinite().all()
    assert found[1].all()
    for part, expected in zip(
        found, reference.quantise_int4(weight, 32, torch.bfloat16), strict=True
    ):
        assert torch.equal(part[:, : part.shape[1] // 2], expected[:, : part.shape[1] // 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused_when_packed(cpu_backend, value):
    weight = torch.randn(3, 96)
    clean = quantise_int4(weight, 32, torch.bfloat16)
    weight[1, 40] = value
    values, scale = quantise_int4(weight, 32, torch.bfloat16)
    assert (~scale.isfinite()).nonzero().tolist() == [[1, 1]]
    assert torch.equal(scale[:, ::2], clean[1][:, ::2])
    assert torch.equal(values[::2], clean[0][::2])
    with pytest.raises(ValueError, match="pack_int4: scale is not finite"):
        pack_int4(values, scale)


@pytest.mark.parametrize(
    ("weight", "group", "dtype", "message"),
    [
        (torch.zeros(2, 64).double(), 32, torch.float32, "weight is torch.float64"),
        (torch.zeros(64), 32, torch.float32, r"weight has shape \(64,\), not 2 dims"),
        (torch.zeros(2, 64), 128, torch.float32, "64 columns in groups of 128"),
        (torch.zeros(2, 64), 16, torch.float32, r"groups of 16: .*\(32, 64, 128\)"),
        (torch.zeros(2, 64), 32, torch.int8, "scale_dtype is torch.int8"),
    ],
)
def test_refused(weight, group, dtype, message):
    with pytest.raises(ValueError, match=f"^quantise_int4: .*{message}"):
        quantise_int4(weight, group, dtype)
