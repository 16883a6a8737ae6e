"""A norm and the layers that read it, in one op: the bits of its parts."""

from dataclasses import replace

import pytest
import torch
from test_linear import packed

from qwen3next_plugin.kernels.linear import linear
from qwen3next_plugin.kernels.norm_linear import norm_linear
from qwen3next_plugin.kernels.rms_norm import Unnormed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
D, EPS = 256, 1e-6


def unnormed(T, dtype, *, with_residual=True):
    """What is to be normed, with gaps between the rows."""
    x = torch.randn(T, D + 3).to(dtype)[:, :D]
    residual = torch.randn(T, D + 5).to(dtype)[:, :D] if with_residual else None
    return Unnormed(x, torch.randn(D).to(dtype), EPS, residual)


def again(one: Unnormed) -> Unnormed:
    """The same, with a residual of its own."""
    return one._replace(residual_=None if one.residual_ is None else one.residual_.clone())


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 33])
def test_as_its_parts(cpu_backend, T, dtype, with_residual):
    weight, other = packed("int4-fp16", 80, D)[0], packed("bf16", 24, D)[0]
    given = unnormed(T, dtype, with_residual=with_residual)
    for weights in ((weight,), (weight, other)):
        apart, at_once = again(given), again(given)
        normed = apart.normed()
        found = norm_linear(at_once, *weights)
        assert len(found) == len(weights)
        for out, each in zip(found, weights, strict=True):
            assert torch.equal(out, linear(normed, each))
        if with_residual:
            assert torch.equal(at_once.residual_, apart.residual_)


def test_refuses(cpu_backend):
    weight, given = packed("int4-fp16", 80, D)[0], unnormed(3, torch.float32)
    before = given.residual_.clone()
    for bad, weights, complaint in (
        (given._replace(residual_=before.half()), (weight,), r"residual_ is torch\.float16"),
        (given._replace(weight=given.weight[1:]), (weight,), "weight has shape"),
        (
            given,
            (packed("int4-fp16", 80, 2 * D)[0],),
            r"weight has shape \(80, 512\), x \(3, 256\)",
        ),
        (given, (weight, replace(weight, scale=weight.scale[1:])), "other.scale has shape"),
    ):
        with pytest.raises(ValueError, match=f"norm_linear: .*{complaint}"):
            norm_linear(bad, *weights)
    assert torch.equal(given.residual_, before)
