"""The native op as torch sees it."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed

native.load()
_op = torch.ops.qwen3next.norm_linear.default

NO_WEIGHT = (None, None, None, 0, 0, 0)


def run(x: Unnormed, weight: PackedWeight, other: PackedWeight | None) -> tuple[Tensor, ...]:
    """Shapes as in the public op."""
    second = NO_WEIGHT if other is None else (*parts(other), other.shape[0])
    both = _op(*x, *parts(weight), weight.shape[0], *second)
    return both[:1] if other is None else both


@torch.library.register_fake("qwen3next::norm_linear")
def _(
    x: Tensor,
    norm: Tensor,
    eps: float,
    residual_: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    encoding: int,
    group: int,
    N: int,
    packed2: Tensor | None,
    scale2: Tensor | None,
    zero2: Tensor | None,
    encoding2: int,
    group2: int,
    N2: int,
) -> tuple[Tensor, Tensor]:
    T = x.shape[0]
    return x.new_empty(T, N), x.new_empty(0 if packed2 is None else T, N2)
