"""The zero-centred norm, with and without a residual."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from qwen3next_plugin.kernels.rms_norm import rms_norm
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize("D", [7, 96, 2048])
@pytest.mark.parametrize("with_residual", [False, True])
def test_against_the_model(backend, T, D, dtype, with_residual):
    x = torch.randn(T, D + 5).to(dtype)[:, :D]
    residual = torch.randn(T, D + 3).to(dtype)[:, :D] if with_residual else None
    weight = torch.randn(D).to(dtype)
    total = x + residual if with_residual else x
    out = rms_norm(x=x, weight=weight, eps=1e-6, residual_=residual)
    model = Qwen3NextRMSNorm(D, eps=1e-6)
    model.weight.data = weight.float()
    ref = model(total.float()).detach()
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert_close("rms_norm", dtype, out, ref)
    if with_residual:
        assert torch.equal(residual, total)


def test_fp32_weight_beside_bf16(backend):
    x, weight = torch.randn(3, 96).bfloat16(), torch.randn(96)
    ref = rms_norm(x=x.float(), weight=weight, eps=1e-6)
    assert_close("rms_norm", torch.bfloat16, rms_norm(x=x, weight=weight, eps=1e-6), ref)


def test_refuses(backend):
    x, weight = torch.zeros(3, 8), torch.zeros(8)
    residual = torch.full((3, 8), 2.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"rms_norm: residual_ is torch\.float64"):
        rms_norm(x=x, weight=weight, eps=1e-6, residual_=residual)
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        rms_norm(x=x, weight=weight[:4], eps=1e-6)
    with pytest.raises(ValueError, match="not contiguous"):
        rms_norm(x=x.t().contiguous().t(), weight=weight, eps=1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: x has shape \(8,\), not 2 dims"):
        rms_norm(x=x[0], weight=weight, eps=1e-6)
    assert (residual == 2).all()
