"""The native op as torch sees it."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert
from qwen3next_plugin.kernels.fused_moe.cpu import shared_parts
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed

native.load()
_op = torch.ops.qwen3next.sparse_moe.default


def run(
    x: Tensor | Unnormed,
    router: PackedWeight,
    top_k: int,
    renormalise: bool,
    w13: PackedWeight,
    w2: PackedWeight,
    shared: SharedExpert | None,
) -> Tensor:
    """Shapes as in the public op."""
    of = x if isinstance(x, Unnormed) else (x, None, 0.0, None)
    chosen, routed = (*parts(router), top_k, renormalise), (*parts(w13), *parts(w2), w2.shape[-1])
    return _op(*of, *chosen, *routed, *shared_parts(shared))


@torch.library.register_fake("qwen3next::sparse_moe")
def _(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)
