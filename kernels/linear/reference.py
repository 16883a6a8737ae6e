"""The layer as its equation, in fp32, and its weight's layout."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3next_plugin.kernels.linear.packed_weight import PANEL, Encoding, PackedWeight, unpack


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
