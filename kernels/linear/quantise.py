"""Rounds a weight to int4, without calibration."""

import torch
from torch import Tensor

from qwen3next_plugin import env
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes
from qwen3next_plugin.kernels.linear import reference
from qwen3next_plugin.kernels.linear.packed_weight import GROUPS, SCALE_DTYPES


def quantise_int4(weight: Tensor, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and scales of int4, without zero points, that leave little squared error.

    For the steps q of weights w, the best scale is <w, q> / <q, q>, which leaves an error of
    <w, w> - <w, q>² / <q, q>. Tries the steps of the scales in `reference.REACHES`. A group's bits
    depend on its weights alone, and are the same on all instruction sets. The scale of a group with
    a weight that is not finite is not finite.

    Args:
        group: columns that share a scale, 32, 64 or 128.

    Shapes: weight [N, K]; returns values [N, K / 2] uint8 and scale [N, K / group], as `pack_int4`
        takes them

    Raises: ValueError for a dtype, a shape, a group that does not divide K.
    """
    op = "quantise_int4"
    N, K = sizes(op, "weight", weight, 2)
    weight = weight.contiguous()
    check(op, "weight", weight, (N, K), ACTIVATIONS, weight.device)
    if group not in GROUPS or K % group:
        raise ValueError(f"{op}: {K} columns in groups of {group}: not whole groups of {GROUPS}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"{op}: scale_dtype is {scale_dtype}, not one of {SCALE_DTYPES}")
    if env.kernels() == "reference" or weight.device.type != "cpu":
        return reference.quantise_int4(weight, group, scale_dtype)
    native.load()
    return torch.ops.qwen3next.quantise_int4(weight, group, scale_dtype)
