"""The token that an int8 copy of the output head, or of some of its rows, ranks first."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check
from qwen3next_plugin.kernels.draft_head.quantise import quantise_rows

__all__ = ["draft_head", "quantise_rows"]


def draft_head(*, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The row r with the greatest scale_r (weight_r · x), and that value; of equals the lowest r.

    x is rounded to integers of the most bits that leave the sums exact in int32 (13 and a sign at
    D = 2048). The result is the same whatever rows share the batch, however many threads run, and
    at every instruction set. A row of x that is not finite gives row 0 and NaN.

    Shapes:
        x: [N, D], any row stride
        weight: [R, D] int8, any row stride, R ≥ 1; scale: [R] fp32, finite (`quantise_rows`)
        returns rows [N] int64, values [N] fp32

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: weights in 8 bits by row, arXiv:2208.07339, without its outlier columns.
    """
    op = "draft_head"
    run = dispatch.implementation(op, x.device)
    N, D = x.shape
    R = weight.shape[0]
    check(op, "x", x, (N, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (R, D), (torch.int8,), x.device)
    check(op, "scale", scale, (R,), FLOAT, x.device)
    if R == 0:
        raise ValueError(f"{op}: weight has no rows to choose from")
    return run(x, weight, scale)
