"""The convolution as its equation, one row at a time."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.causal_conv1d.arguments import check_arguments
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
    T, _C = x.shape
    W = conv_.shape[1] - 3
    out = torch.zeros_like(x)
    for row in checked_rows(query_start_loc, slot, context_len, span, T, W):
        page, n = conv_[row.slot], row.end - row.begin
        history = torch.zeros_like(page[:3]) if row.fresh else page[row.committed :][:3]
        inputs = torch.cat([history, x[row.begin : row.end]])  # [3 + n, C]
        y = sum(inputs[j : j + n].float() * weight[:, j].float() for j in range(4))
        out[row.begin : row.end] = silu(y)
        if n <= W:
            page[: 3 + n] = inputs
        else:
            page[:3] = inputs[-3:]
    return out
