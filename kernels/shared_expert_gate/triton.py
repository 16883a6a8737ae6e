"""The gate in Triton: a token in the registers of one program."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.scalar_math import sigmoid


def run(x: Tensor, weight: Tensor, shared_: Tensor, routed: Tensor | None) -> None:
    """Shapes as in the public op."""
    T, D = x.shape
    if T:
        other = shared_ if routed is None else routed
        _shared_expert_gate[T,](
            x, x.stride(0), weight, shared_, shared_.stride(0), other, other.stride(0),
            ADDS=routed is not None, D=D, BD=next_power_of_2(D),
            **config_for(x.device).rowwise.options(),
        )  # fmt: skip


@triton.jit
def _shared_expert_gate(
    x, x_token, weight, shared, shared_token, routed, routed_token,
    ADDS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token; grid (T)."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BD)
    inside = at < D
    y = tl.load(shared + t * shared_token + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + t * x_token + at, mask=inside, other=0.0).to(tl.float32) * w
    y *= sigmoid(tl.sum(gate, 0))
    if ADDS:
        y += tl.load(routed + t * routed_token + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(shared + t * shared_token + at, y.to(shared.dtype.element_ty), mask=inside)
