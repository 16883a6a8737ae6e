"""The shared expert's gate as a module that holds a weight."""

import torch
from torch import nn

from qwen3next_plugin.kernels.shared_expert_gate import shared_expert_gate


class SharedExpertGate(nn.Module):
    """σ(x·w) times the shared expert's output, in place.

    A parameter of ours, not a layer of the host: hosts pack the weights of their layers, and the op
    reads a plain one.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size), requires_grad=False)

    def forward(
        self, x: torch.Tensor, shared_: torch.Tensor, routed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gate `shared_` by x, and add the routed experts' output.

        Shapes:
            x, shared_, routed [T, D], returns shared_
        """
        shared_expert_gate(x=x, weight=self.weight, shared_=shared_, routed=routed)
        return shared_
