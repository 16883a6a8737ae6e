"""The layer as its equation, in fp32, its weight's layout, and rounding to int4."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3next_plugin.kernels.linear.packed_weight import (
    PANEL,
    Encoding,
    PackedWeight,
    joined,
    unpack,
)

SMALLEST = 1e-8  # a scale: of weights that are all zeros
# What scales of int4 reach, over the largest weight of a group. Reaching it alone leaves 12 % more
# squared error on the shipped checkpoint; 23 instead of these four would leave 1.3 % less.
REACHES = (0.97, 0.89, 0.81, 0.73)


def run(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    """Shapes as in the public op."""
    return (x.float() @ unpack(weight).T).to(out_dtype)


def panels(rows: Tensor, encoding: Encoding, line: int) -> Tensor:
    """The bytes of a weight [..., N, bytes], a row padded to `line` bytes, as kernels read them.

    Returns `packed` of `PackedWeight`.

    Raises: ValueError for a NaN in fp8.
    """
    if encoding == "fp8" and ((rows & 127) == 127).any():
        raise ValueError("pack_fp8: values has NaN")
    N, width = rows.shape[-2:]
    padded = pad(rows, (0, line - width, 0, -N % PANEL)).unflatten(-2, (-1, PANEL))
    if encoding == "int8":
        units = padded.unflatten(-1, (-1, 2))
    elif encoding == "bf16":
        units = padded.unflatten(-1, (-1, 4))
    elif encoding == "fp8":  # bytes 0, 2, 1, 3
        units = padded.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(-2)
    else:  # nibbles 0, 2, 4, 6, 1, 3, 5, 7
        pairs = torch.stack([padded & 15, padded >> 4], -2).unflatten(-1, (-1, 2, 2))
        units = pairs.movedim(-4, -3)  # [..., panels, 16, K / 8, column % 2, bytes, 2]
        units = (units[..., 0] | units[..., 1] << 4).flatten(-2)
    return units.transpose(-3, -2).flatten(-3)  # [..., panels, K / columns of a unit, 16, bytes]


def quantise_int4(weight: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    grouped = weight.float().unflatten(1, (-1, group))
    scale = _scale(grouped).to(scale_dtype)
    steps = _steps(grouped, scale.float().reciprocal())
    return joined(steps.add_(8).flatten(1).to(torch.uint8)), scale


def _scale(grouped: Tensor) -> Tensor:
    """The scales of int4 with the least squared error.

    Shapes: grouped [N, G, group], returns [N, G]
    """
    low, high = grouped.aminmax(dim=-1)
    largest = torch.where(high > -low, high, low)  # of which -8 times the scale is nearest
    largest = torch.where(largest.abs() < SMALLEST, SMALLEST, largest)
    best, scale = torch.zeros_like(largest), largest / -8
    for reach in REACHES:
        steps = _steps(grouped, -8 / reach / largest)
        along = (grouped * steps).sum(-1)
        square = steps.square_().sum(-1)
        saved = along.square() / square
        better = saved > best
        best = torch.where(better, saved, best)
        scale = torch.where(better, along / square, scale)
    return scale


def _steps(grouped: Tensor, inverse: Tensor) -> Tensor:
    """Weights in steps of their scale, -8 to 7. Shapes: grouped [N, G, group], inverse [N, G]"""
    return (grouped * inverse[..., None]).round_().clamp_(-8, 7)
