"""The convolution as its equation, one row and token at a time."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH, check_arguments
from qwen3next_plugin.kernels.step import checked_rows


def causal_conv1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    conv_: Tensor,
    span: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> Tensor:
    """Shapes as in the public op; returns [T, C]."""
    check_arguments(q, k, v, weight, conv_, span, query_start_loc, slot, context_len)
    x = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)  # [T, C]
    T, ring = len(x), conv_.shape[1]
    out = torch.zeros_like(x)
    for row in checked_rows(query_start_loc, slot, context_len, span, T, ring - WIDTH):
        inputs = conv_[row.slot]  # the input at position p lies at p % ring
        for p, t in enumerate(range(row.begin, row.end), start=row.context):
            inputs[p % ring] = x[t]
            past = [(j, p - 3 + j) for j in range(WIDTH) if p - 3 + j >= 0]
            out[t] = silu(sum(weight[:, j].float() * inputs[at % ring].float() for j, at in past))
    return out
