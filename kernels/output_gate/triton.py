"""The gate in Triton: a token's heads at once."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.scalar_math import sigmoid


def run(x_: Tensor, gate: Tensor) -> None:
    """Shapes as in the public op."""
    T, H, D = x_.shape
    if x_.numel():
        _output_gate[T, H](
            x_, gate, *gate.stride()[:2],
            H=H, D=D, BD=next_power_of_2(D), **config_for(x_.device).commit.options(),
        )  # fmt: skip


@triton.jit
def _output_gate(
    x, gate, gate_token, gate_head, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """A head of one token; grid (T, H)."""
    t, h, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    x_at = x + (t * H + h) * D + at
    y = tl.load(x_at, mask=at < D, other=0.0).to(tl.float32)
    g = tl.load(gate + t * gate_token + h * gate_head + at, mask=at < D, other=0.0)
    tl.store(x_at, (y * sigmoid(g.to(tl.float32))).to(x.dtype.element_ty), mask=at < D)
