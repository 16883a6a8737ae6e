"""The token that some rows of an int8 copy of the output head rank first."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, INT, check
from qwen3next_plugin.kernels.draft_head.quantise import quantise_rows

__all__ = ["draft_head", "quantise_rows"]


def draft_head(*, x: Tensor, weight: Tensor, scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The r among `rows` with the greatest scale_r (weight_r · x), and that value.

    Of equals the first in `rows`.

    x is rounded to integers of the most bits that leave the sums exact in int32 (13 and a sign at
    D = 2048). The result is the same whatever rows share the batch, however many threads run, and
    at every instruction set. A row of x that is not finite gives the first of `rows` and NaN.

    Shapes:
        x: [N, D], any row stride
        weight: [V, D] int8, any row stride; scale: [V] fp32, finite (`quantise_rows`)
        rows: [R] int32, R ≥ 1, in any order
        returns r [N] int64, values [N] fp32

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: an entry of `rows` that is no row of weight.

    Source: weights in 8 bits by row, arXiv:2208.07339, without its outlier columns.
    """
    op = "draft_head"
    run = dispatch.implementation(op, x.device)
    N, D = x.shape
    V, R = weight.shape[0], rows.shape[0]
    check(op, "x", x, (N, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (V, D), (torch.int8,), x.device)
    check(op, "scale", scale, (V,), FLOAT, x.device)
    check(op, "rows", rows, (R,), INT, x.device)
    if R == 0:
        raise ValueError(f"{op}: there are no rows to choose from")
    return run(x, weight, scale, rows)
