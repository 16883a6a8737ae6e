"""The convolution as its equation, one row and token at a time."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH, ConvInputs, check_arguments
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step, checked_rows


def run(x: ConvInputs, weight: Tensor, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op; returns [T, C]."""
    check_arguments(x, weight, pool, step)
    inputs = torch.cat([part.flatten(1) for part in x], dim=-1)  # [T, C]
    T, ring = len(inputs), pool.conv.shape[1]
    out = torch.zeros_like(inputs)
    for row in checked_rows(step, pool.span, T, ring - WIDTH):
        kept = pool.conv[row.slot]  # the input at position p is at p % ring
        for p, t in enumerate(range(row.begin, row.end), start=row.context):
            kept[p % ring] = inputs[t]
            past = [(j, p - 3 + j) for j in range(WIDTH) if p - 3 + j >= 0]
            terms = [weight[:, j].float() * kept[at % ring].float() for j, at in past]
            out[t] = silu(sum(terms, start=torch.zeros_like(terms[0])))
    return out
