"""A linear layer with a packed weight: bf16, int8, int4, FP8 or FP4."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes
from qwen3next_plugin.kernels.linear.cut import cut
from qwen3next_plugin.kernels.linear.pack import (
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_mxfp4,
    pack_nvfp4,
)
from qwen3next_plugin.kernels.linear.packed_weight import (
    PackedWeight,
    Stack,
    check_weight,
    stack,
    take_channels,
    unpack,
)
from qwen3next_plugin.kernels.linear.quantise import quantise_int4

__all__ = [
    "PackedWeight",
    "Stack",
    "cut",
    "linear",
    "pack_bf16",
    "pack_fp8",
    "pack_int4",
    "pack_int8",
    "pack_mxfp4",
    "pack_nvfp4",
    "quantise_int4",
    "stack",
    "take_channels",
    "unpack",
]


def linear(x: Tensor, weight: PackedWeight, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """out = x Wᵀ, with W = scale (values − zero).

    A token's bits depend on its x and the weight, in bf16 and fp8 also on the instruction set. A
    token with an element that is not finite gives no finite output.

    int8, int4, FP4: x is rounded, block by block, to 15 bits and a sign times a power of two (fp32:
    28 bits). A block is a group of the weight; without groups it has 128 columns (int4), or the
    largest divisor of the padded K up to 512 (int8). A bf16 element is exact unless it is below
    1/128 of its block's largest, or of 2^-80. A block is summed in int32, exactly; blocks are added
    in fp32, in order. So all instruction sets give the same bits, unless a sum leaves fp32's normal
    range.
    bf16, fp8: values are decoded exactly and products summed in fp32, in a fixed order.

    Args:
        out_dtype: x's, or fp32: the sums, which other dtypes round; None: x's.

    Shapes: x [M, K], any stride of dim 0; weight [N, K]; returns [M, N]

    Raises: ValueError for an argument's shape, stride, device or dtype.
    """
    op = "linear"
    run = dispatch.implementation(op, x.device)
    M, _ = sizes(op, "x", x, 2)
    check_weight(op, "weight", weight, 2, x.device)
    check(op, "x", x, (M, weight.shape[1]), ACTIVATIONS, x.device)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"{op}: out_dtype is {out_dtype}, not {x.dtype} or torch.float32")
    return run(x, weight, out_dtype or x.dtype)
