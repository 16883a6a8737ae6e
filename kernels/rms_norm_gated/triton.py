"""The gated norm in Triton: all value heads of a key head at once."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.scalar_math import sigmoid, silu


def run(x: Tensor, z: Tensor, weight: Tensor, eps: float, sigmoid_gate: bool) -> Tensor:
    """Shapes as in the public op."""
    T, H, R, V = x.shape
    out = x.new_empty(T, H * R * V)
    if out.numel():
        _rms_norm_gated[T, H](
            x, *x.stride()[:3], z, *z.stride()[:3], weight, out, eps,
            H=H, R=R, V=V, SIGMOID=sigmoid_gate, BR=next_power_of_2(R), BV=next_power_of_2(V),
            **config_for(x.device).rowwise.options(),
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm_gated(
    x, x_token, x_head, x_value, z, z_token, z_head, z_value, weight, out, eps,
    H: tl.constexpr, R: tl.constexpr, V: tl.constexpr, SIGMOID: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The value heads [R, V] of one token and key head; grid (T, H)."""
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, at = tl.arange(0, BR)[:, None], tl.arange(0, BV)[None, :]
    inside = (r < R) & (at < V)
    x_at = x + t * x_token + h * x_head + r * x_value + at
    z_at = z + t * z_token + h * z_head + r * z_value + at
    y = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z_at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=at < V, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1) / V + eps)[:, None] * w
    y *= sigmoid(gate) if SIGMOID else silu(gate)
    to = out + ((t * H + h) * R + r) * V + at
    tl.store(to, y.to(out.dtype.element_ty), mask=inside)
