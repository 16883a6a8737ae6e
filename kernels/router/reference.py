"""The router as its equation."""

import torch
from torch import Tensor


def run(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    ranked, experts = logits.float().sort(dim=-1, descending=True, stable=True)
    weights = ranked.softmax(-1)[:, :top_k].contiguous()
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = experts[:, :top_k].int()
    undefined = weights.isnan().any(-1, keepdim=True)
    return weights, torch.where(undefined, torch.arange(top_k, device=logits.device).int(), experts)
