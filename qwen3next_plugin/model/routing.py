"""The router with the signature that both hosts expect of a routing function."""

import torch

from qwen3next_plugin.kernels.router import router


def route(
    *, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes: gating_output [T, E], returns weights [T, k] fp32, experts [T, k] int32."""
    return router(logits=gating_output, k=topk, renormalise=renormalize)
