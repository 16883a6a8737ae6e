"""The router as a function with the parameters that both hosts give a routing function."""

import torch

from qwen3next_plugin.kernels.router import router


def route(
    *, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes: gating_output [T, E], returns weights [T, k] fp32, experts [T, k] int32."""
    return router(logits=gating_output, k=topk, renormalise=renormalize)
