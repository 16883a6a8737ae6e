"""The native experts as torch sees them."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight

native.load()


def run(
    x: Tensor,
    w13: Tensor | PackedWeight,
    w2: Tensor | PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
) -> Tensor:
    """Shapes as in the public op; both weights are packed, or none is."""
    ops = torch.ops.qwen3next
    if isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight):
        inner = w2.shape[-1]
        return ops.fused_moe_packed(x, *parts(w13), *parts(w2), inner, topk_weights, topk_ids)
    return ops.fused_moe(x, w13, w2, topk_weights, topk_ids)


@torch.library.register_fake("qwen3next::fused_moe")
def _(x: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("qwen3next::fused_moe_packed")
def _(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)
