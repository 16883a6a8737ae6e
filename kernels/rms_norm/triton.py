"""The norm in Triton: a token in registers."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu.configs import config_for


def run(x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None) -> Tensor:
    """Shapes as in the public op."""
    T, D = x.shape
    out = x.new_empty(T, D)
    if T:
        total = x if residual_ is None else residual_
        _rms_norm[T,](
            x, x.stride(0), total, total.stride(0), weight, out, eps,
            ADDS=residual_ is not None, D=D, BD=next_power_of_2(D),
            **config_for(x.device).rowwise.options(),
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm(
    x, x_token, residual, residual_token, weight, out, eps,
    ADDS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token; grid (T)."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BD)
    inside = at < D
    y = tl.load(x + t * x_token + at, mask=inside, other=0.0)
    if ADDS:
        before = tl.load(residual + t * residual_token + at, mask=inside, other=0.0)
        y = (y.to(tl.float32) + before.to(tl.float32)).to(y.dtype)
        tl.store(residual + t * residual_token + at, y, mask=inside)
    y = y.to(tl.float32)
    w = 1.0 + tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * w
    tl.store(out + t * D + at, y.to(out.dtype.element_ty), mask=inside)
