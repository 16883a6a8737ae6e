"""The zero-centred RMSNorm as a module that holds a weight."""

import torch
from torch import nn

from qwen3next_plugin.kernels.rms_norm import Unnormed


class RMSNorm(nn.Module):
    """x·rsqrt(mean x² + ε)·(1 + w), in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor, residual_: torch.Tensor | None = None) -> torch.Tensor:
        """Norm `x`, or norm `residual_ + x` and leave that sum in `residual_`.

        Shapes:
            x [T, D], residual_ [T, D], returns [T, D]
        """
        return self.before(x, residual_).normed()

    def before(self, x: torch.Tensor, residual_: torch.Tensor | None = None) -> Unnormed:
        """The arguments of `forward`, for an op that norms x itself. Shapes as there."""
        return Unnormed(x, self.weight, self.eps, residual_)
