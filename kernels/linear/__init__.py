"""A linear layer whose weight is quantised and packed."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes
from qwen3next_plugin.kernels.linear.packing import pack_bf16, pack_fp8, pack_int4, pack_int8
from qwen3next_plugin.kernels.linear.weight import (
    Weight,
    check_weight,
    concatenate,
    stack,
    take_rows,
    unpack,
)

__all__ = [
    "Weight",
    "concatenate",
    "linear",
    "pack_bf16",
    "pack_fp8",
    "pack_int4",
    "pack_int8",
    "stack",
    "take_rows",
    "unpack",
]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """out = x Wᵀ, with W = scale (values − zero).

    The bits of a row of out depend on that row of x and on the weight alone. A row with an element
    that is not finite gives no finite number.

    int8 and int4: each block of a row of x is rounded to 15 bits and a sign, times a power of two
    (fp32: 28 bits). A block is a group; of int8 without groups 512 columns, or as many as divide
    the row, of int4 128. A bf16 element is exact unless it is below 1/128 of its block's largest.
    The products of a block are summed in int32, exactly; blocks are added in fp32, in order. So the
    result is also the same at every instruction set.
    fp8: values are decoded exactly. Products are summed in fp32, in a fixed order.

    Shapes: x [M, K], any row stride; weight [N, K]; returns [M, N] of x's dtype

    Raises: ValueError for an argument's shape, stride, device or dtype.
    """
    op = "linear"
    run = dispatch.implementation(op, x.device)
    M, _ = sizes(op, "x", x, 2)
    check_weight(op, "weight", weight, 2, x.device)
    check(op, "x", x, (M, weight.shape[1]), ACTIVATIONS, x.device)
    return run(x, weight)
