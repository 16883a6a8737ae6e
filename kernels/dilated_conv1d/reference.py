"""The convolution as its equation, one row and token at a time."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH
from qwen3next_plugin.kernels.dilated_conv1d.arguments import check_arguments, reach
from qwen3next_plugin.kernels.step import Step, checked_rows


def run(
    x: Tensor, weight: Tensor, dilation: int, conv_: Tensor, span: Tensor, step: Step
) -> Tensor:
    """Shapes as in the public op."""
    check_arguments(x, weight, dilation, conv_, span, step)
    ring, taps = conv_.shape[1], weight.float().unbind(1)
    out = x.new_zeros(x.shape)
    for row in checked_rows(step, span, len(x), ring - reach(dilation)):
        kept = conv_[row.slot]  # the input at position p is at p % ring
        for p, t in enumerate(range(row.begin, row.end), start=row.context):
            kept[p % ring] = x[t]
            past = [(j, p - (WIDTH - 1 - j) * dilation) for j in range(WIDTH)]
            terms = [taps[j] * kept[at % ring].float() for j, at in past if at >= 0]
            out[t] = silu(torch.stack(terms).sum(0))
    return out
