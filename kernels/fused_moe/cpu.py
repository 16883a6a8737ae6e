"""The native experts as torch sees them."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight

native.load()
_op = torch.ops.qwen3next.fused_moe.default
_op_packed = torch.ops.qwen3next.fused_moe_packed.default

NO_WEIGHT = (None, None, None, 0, 0)
NO_SHARED_EXPERT = (None, *NO_WEIGHT, *NO_WEIGHT, 0)


def run(
    x: Tensor,
    w13: Tensor | PackedWeight,
    w2: Tensor | PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: SharedExpert | None = None,
) -> Tensor:
    """Shapes as in the public op; both weights are packed, or none is."""
    if isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight):
        routed = (x, *parts(w13), *parts(w2), w2.shape[-1], topk_weights, topk_ids)
        return _op_packed(*routed, *shared_parts(shared))
    return _op(x, w13, w2, topk_weights, topk_ids)


def shared_parts(expert: SharedExpert | None) -> tuple:
    """The shared expert as the native op takes it."""
    if expert is None:
        return NO_SHARED_EXPERT
    return expert.gate, *parts(expert.w13), *parts(expert.w2), expert.w2.shape[-1]


@torch.library.register_fake("qwen3next::fused_moe")
def _(x: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("qwen3next::fused_moe_packed")
def _(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)
