"""The gated norm of the linear-attention output."""

import pytest
import torch
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNormGated

from qwen3next_plugin.kernels.rms_norm_gated import rms_norm_gated
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize(("H", "R", "V"), [(2, 2, 128), (3, 1, 17), (1, 4, 48)])
@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_against_the_model(backend, T, H, R, V, dtype, gate):
    x = torch.randn(T, H, R, V + 3).to(dtype)[..., :V]
    grouped = torch.full((T, H, 2 * V + R * V), torch.nan, dtype=dtype)
    z = grouped[..., 2 * V :].unflatten(2, (R, V))
    z.copy_(torch.randn(z.shape))
    weight = torch.randn(V).to(dtype)
    out = rms_norm_gated(x=x, z=z, weight=weight, eps=1e-6, sigmoid_gate=gate == "sigmoid")
    model = Qwen4ExpTextRMSNormGated(V, eps=1e-6, activation=gate)
    model.weight.data = weight.float()
    assert out.shape == (T, H * R * V)
    assert out.dtype == dtype
    assert out.is_contiguous()
    ref = model(x.float(), z.float()).detach().flatten(1)
    assert_close("rms_norm_gated", dtype, out, ref)


def test_refuses(backend):
    x, weight = torch.zeros(2, 2, 2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"rms_norm_gated: z is torch\.bfloat16"):
        rms_norm_gated(x=x, z=x.bfloat16(), weight=weight, eps=1e-6)
    with pytest.raises(ValueError, match="rms_norm_gated: z has shape"):
        rms_norm_gated(x=x, z=x[:, :1], weight=weight, eps=1e-6)
    with pytest.raises(ValueError, match="last dim of z"):
        rms_norm_gated(
            x=x, z=x.transpose(2, 3).contiguous().transpose(2, 3), weight=weight, eps=1e-6
        )
    with pytest.raises(ValueError, match=r"rms_norm_gated: x has shape \(2, 4, 8\), not 4 dims"):
        rms_norm_gated(x=x.flatten(1, 2), z=x, weight=weight, eps=1e-6)
