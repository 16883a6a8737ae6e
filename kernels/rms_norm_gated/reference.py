"""The gated norm as its equation."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def run(x: Tensor, z: Tensor, weight: Tensor, eps: float, sigmoid_gate: bool) -> Tensor:
    """Shapes as in the public op."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    gate = z.float().sigmoid() if sigmoid_gate else silu(z.float())
    return (normed * weight.float() * gate).to(x.dtype).flatten(1)
