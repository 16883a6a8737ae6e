"""The sigmoid gate on the full-attention output."""

import pytest
import torch

from qwen3next_plugin.kernels.output_gate import output_gate
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize(("H", "D"), [(4, 256), (3, 17)])
def test_against_torch(backend, T, H, D, dtype):
    qkv = torch.randn(T, H * 2 * D + 5).to(dtype)
    gate = qkv[:, : H * 2 * D].unflatten(1, (H, 2, D))[:, :, 1]
    x = torch.randn(T, H, D).to(dtype)
    ref = x.double() * gate.double().sigmoid()
    output_gate(x_=x, gate=gate)
    assert_close("output_gate", dtype, x, ref)


def test_refuses(backend):
    x = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match=r"output_gate: gate is torch\.float16"):
        output_gate(x_=x, gate=x.half())
    with pytest.raises(ValueError, match="output_gate: x_ is not contiguous"):
        output_gate(x_=x.transpose(0, 1), gate=x.transpose(0, 1))
    with pytest.raises(ValueError, match=r"output_gate: x_ has shape \(2, 24\), not 3 dims"):
        output_gate(x_=x.flatten(1), gate=x)
    assert (x == 1).all()
