"""The experts as their equation, one after the other, in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight, unpack


def run(
    x: Tensor,
    w13: Tensor | PackedWeight,
    w2: Tensor | PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: SharedExpert | None = None,
) -> Tensor:
    """Shapes as in the public op."""
    w13 = unpack(w13) if isinstance(w13, PackedWeight) else w13
    w2 = unpack(w2) if isinstance(w2, PackedWeight) else w2
    E = len(w13)
    outside = ((topk_ids < -1) | (topk_ids >= E)).nonzero()
    if len(outside):
        t, j = outside[0].tolist()
        raise RuntimeError(
            f"fused_moe: topk_ids[{t}, {j}] = {int(topk_ids[t, j])} is not one of {E} experts"
        )
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in topk_ids[topk_ids >= 0].unique().tolist():
        t, j = (topk_ids == e).nonzero(as_tuple=True)
        out.index_add_(0, t, topk_weights[t, j, None] * _expert(x[t], w13[e], w2[e]))
    if shared is not None:
        weight = (x.float() * shared.gate.float()).sum(-1, keepdim=True).sigmoid()  # [T, 1]
        out += weight * _expert(x, unpack(shared.w13), unpack(shared.w2))
    return out.to(x.dtype)


def _expert(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert's output, in fp32. Shapes: x [n, D], w13 [2I, D], w2 [D, I], returns [n, D]."""
    gate, up = (x.float() @ w13.float().T).chunk(2, dim=-1)  # [n, I]
    h = (silu(gate) * up).to(x.dtype).float()
    return h @ w2.float().T
