"""SwiGLU between its products."""

import pytest
import torch

from qwen3next_plugin.kernels.silu_and_mul import silu_and_mul
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize("I", [17, 512])
def test_against_torch(cpu_backend, T, I, dtype):  # noqa: E741, the field's letter
    x = (4 * torch.randn(T, 2 * I + 5)).to(dtype)[:, : 2 * I]
    gate, up = x.double().chunk(2, dim=-1)
    out = silu_and_mul(x)
    assert out.dtype == dtype
    assert_close("silu_and_mul", dtype, out, torch.nn.functional.silu(gate) * up)
    for t in range(T):
        assert torch.equal(silu_and_mul(x[t : t + 1])[0], out[t])


def test_refuses(cpu_backend):
    with pytest.raises(ValueError, match=r"silu_and_mul: x has shape \(2, 7\), not \(2, 6\)"):
        silu_and_mul(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"silu_and_mul: x has shape \(8,\), not 2 dims"):
        silu_and_mul(torch.ones(8))
    with pytest.raises(ValueError, match=r"silu_and_mul: x is torch\.float64"):
        silu_and_mul(torch.ones(2, 8, dtype=torch.float64))
