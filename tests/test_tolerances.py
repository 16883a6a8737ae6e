"""The comparison of tensors sees an error that only one row has."""

import pytest
import torch

from tolerances import BF16, FP32, assert_close


def test_one_wrong_row_of_many_fails():
    """A thousandth of the tensor's norm: less than the bound on the whole, were there one."""
    ref = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    out = ref.clone()
    assert_close("linear", FP32, out, ref)
    out[77] *= 1.05
    assert (out - ref).norm() / ref.norm() < 1e-3
    with pytest.raises(AssertionError, match="in row 77"):
        assert_close("linear", BF16, out, ref)


def test_a_row_of_zeros_must_be_zeros():
    ref = torch.zeros(3, 8)
    assert_close("linear", BF16, ref, ref)
    with pytest.raises(AssertionError, match="relative error inf"):
        assert_close("linear", BF16, torch.full((3, 8), 1e-9), ref)
