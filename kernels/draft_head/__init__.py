"""Greedy draft tokens, chosen from part of the vocabulary by an int8 copy of the output head."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, INT, check, sizes
from qwen3next_plugin.kernels.draft_head.quantise import quantise_channels

__all__ = ["draft_head", "quantise_channels"]


def draft_head(
    *, x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The token t of `token_ids` with the greatest scale_t (weight_t · x), and that value.

    Of equal values the first in `token_ids` wins.

    x is rounded to integers with as many bits as keep the sums exact in int32 (13 and a sign at
    D = 2048). So the result does not depend on the rest of the batch, the number of threads or the
    instruction set. An x that is not finite gives the first of `token_ids` and NaN.

    Shapes:
        x: [N, D], any stride of dim 0
        weight: [V, D] int8, any stride of dim 0; scale: [V] fp32, finite (`quantise_channels`)
        token_ids: [R] int32, R ≥ 1, in any order
        returns t [N] int64, values [N] fp32

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: an entry of `token_ids` outside the vocabulary.

    Source: row-wise 8-bit weights of arXiv:2208.07339, without its outlier columns.
    """
    op = "draft_head"
    run = dispatch.implementation(op, x.device)
    N, D = sizes(op, "x", x, 2)
    V, _ = sizes(op, "weight", weight, 2)
    (R,) = sizes(op, "token_ids", token_ids, 1)
    check(op, "x", x, (N, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (V, D), (torch.int8,), x.device)
    check(op, "scale", scale, (V,), FLOAT, x.device)
    check(op, "token_ids", token_ids, (R,), INT, x.device)
    if R == 0:
        raise ValueError(f"{op}: token_ids is empty")
    return run(x, weight, scale, token_ids)
