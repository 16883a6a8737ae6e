"""The router as its equation."""

import torch
from torch import Tensor


def run(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    ranked, experts = logits.float().sort(dim=-1, descending=True, stable=True)
    weights = ranked.softmax(-1)[:, :k].contiguous()
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = experts[:, :k].int()
    undefined = weights.isnan().any(-1, keepdim=True)
    return weights, torch.where(undefined, torch.arange(k, device=logits.device).int(), experts)
