"""Packs values and scales, as checkpoints have them, into a `PackedWeight`."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3next_plugin import env
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear import reference
from qwen3next_plugin.kernels.linear.packed_weight import (
    BITS,
    BLOCK,
    ENCODINGS,
    FP4_GROUPS,
    FP4_SCALES,
    GROUPS,
    PANEL,
    SCALE_DTYPES,
    Encoding,
    PackedWeight,
)

LARGEST: Mapping[Encoding, int] = {"nvfp4": 126, "mxfp4": 254}  # codes of positive, finite scales


def pack_int8(values: Tensor, scale: Tensor) -> PackedWeight:
    """Symmetric int8, one scale for each output channel or group.

    Shapes: values [..., N, K] int8; scale [..., N, 1] or [..., N, K / group], group 32, 64 or 128.
        One leading dim is of experts.

    Raises: ValueError for a dtype, a shape, a group that does not divide K, a scale that is not
        finite.
    """
    _check_values("pack_int8", values, torch.int8)
    return _weight("int8", values, _group("pack_int8", values.shape, scale), scale, None)


def pack_int4(values: Tensor, scale: Tensor, zero: Tensor | None = None) -> PackedWeight:
    """int4, values and zero points 0 to 15, one scale for each output channel or group.

    Shapes: values [..., N, K / 2] uint8, two columns a byte, the lower nibble first; scale, zero
        [..., N, 1] or [..., N, K / group]. `zero` is uint8; None: 8.

    Raises: as `pack_int8`; ValueError for a zero point above 15.
    """
    op = "pack_int4"
    _check_values(op, values, torch.uint8)
    group = _group(op, _shape("int4", values), scale)
    if zero is not None and zero.numel() and int(zero.max()) > 15:
        raise ValueError(f"{op}: zero has {int(zero.max())}; 4 bits hold 0 to 15")
    if zero is not None and (zero.dtype != torch.uint8 or zero.shape != scale.shape):
        raise ValueError(
            f"{op}: zero is {zero.dtype} {tuple(zero.shape)}, not torch.uint8 {tuple(scale.shape)}"
        )
    return _weight("int4", values, group, scale, zero)


def pack_fp8(values: Tensor, scale: Tensor) -> PackedWeight:
    """FP8 e4m3, one scale for each block of 128 × 128, group of 128 or output channel.

    Shapes: values [..., N, K] float8_e4m3fn; scale [..., ⌈N/128⌉, ⌈K/128⌉], [..., N, ⌈K/128⌉] or
        [..., N, 1]

    Raises: as `pack_int8`; ValueError for a NaN.
    """
    op = "pack_fp8"
    _check_values(op, values, torch.float8_e4m3fn)
    *lead, N, K = values.shape
    blocks = (*lead, -(-N // BLOCK), -(-K // BLOCK))
    if scale.shape == blocks:
        scale, group = scale.repeat_interleave(BLOCK, -2)[..., :N, :], BLOCK
    elif scale.shape in ((*lead, N, blocks[-1]), (*lead, N, 1)):
        group = BLOCK if scale.shape[-1] > 1 else 0
    else:
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, not {blocks}, {(*lead, N, blocks[-1])} or"
            f" {(*lead, N, 1)}"
        )
    return _weight("fp8", values, group, scale, None)


def pack_nvfp4(values: Tensor, scale: Tensor, channel_scale: Tensor) -> PackedWeight:
    """FP4 e2m1, an e4m3 scale for each 16 columns, times an fp32 scale for each output channel.

    Shapes: values [..., N, K / 2] uint8, two columns a byte, the lower nibble first; scale
        [..., N, K / 16] float8_e4m3fn; channel_scale [..., N, 1] fp32

    Raises: as `pack_int8`.
    """
    op = "pack_nvfp4"
    weight = _fp4("nvfp4", values, scale)
    expected = (*scale.shape[:-1], 1)
    if channel_scale.dtype != torch.float32 or channel_scale.shape != expected:
        raise ValueError(
            f"{op}: channel_scale is {channel_scale.dtype} {tuple(channel_scale.shape)}, not "
            f"torch.float32 {expected}"
        )
    if not channel_scale.isfinite().all():
        raise ValueError(f"{op}: channel_scale is not finite")
    of_channels = _lanes(channel_scale).view(torch.uint8).unflatten(-1, (-1, PANEL))
    return replace(weight, scale=torch.cat([of_channels.flatten(-3, -2), weight.scale], -2))


def pack_mxfp4(values: Tensor, scale: Tensor) -> PackedWeight:
    """FP4 e2m1, a power of two as the scale of each 32 columns.

    Shapes: values [..., N, K / 2] uint8, two columns a byte, the lower nibble first; scale
        [..., N, K / 32] float8_e8m0fnu

    Raises: as `pack_int8`.
    """
    return _fp4("mxfp4", values, scale)


def _fp4(encoding: Encoding, values: Tensor, scale: Tensor) -> PackedWeight:
    op, group, dtype = f"pack_{encoding}", FP4_GROUPS[encoding], FP4_SCALES[encoding]
    _check_values(op, values, torch.uint8)
    *lead, K = _shape(encoding, values)
    if scale.dtype != dtype or scale.shape != (*lead, K // group) or K % group:
        raise ValueError(
            f"{op}: scale is {scale.dtype} {tuple(scale.shape)}, not {dtype} of each {group} of "
            f"{K} columns"
        )
    codes = scale.view(torch.uint8)
    if codes.numel() and int(codes.max()) > LARGEST[encoding]:
        raise ValueError(f"{op}: scale is negative, or not finite")
    return _packed(encoding, values, group, codes, None)


def pack_bf16(values: Tensor) -> PackedWeight:
    """The matrix itself.

    Shapes: values [..., N, K] bf16. One leading dim is of experts.

    Raises: ValueError for a dtype or a shape.
    """
    _check_values("pack_bf16", values, torch.bfloat16)
    return _weight("bf16", values, 0, values.new_empty(*values.shape[:-1], 0), None)


def _check_values(op: str, values: Tensor, dtype: torch.dtype) -> None:
    if values.dtype != dtype or values.dim() not in (2, 3):
        raise ValueError(
            f"{op}: values is {values.dtype} {tuple(values.shape)}, not {dtype} [N, K] or [E, N, K]"
        )


def _shape(encoding: Encoding, values: Tensor) -> tuple[int, ...]:
    """(N, K) or (E, N, K) of values as a checkpoint has them."""
    *lead, width = values.shape
    return (*lead, 2 * width if BITS[encoding] == 4 else width)


def _group(op: str, shape: tuple[int, ...], scale: Tensor) -> int:
    """Columns that share a scale; 0: all."""
    *lead, N, K = shape
    if scale.shape[:-1] != (*lead, N):
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, not {(*lead, N, 'groups')} as values"
        )
    groups = scale.shape[-1]
    if groups == 1 and K not in GROUPS:
        return 0
    if not groups or K % groups or K // groups not in GROUPS:
        raise ValueError(
            f"{op}: {groups} scales for {K} columns: not one, nor one for each 32, 64 or 128"
        )
    return K // groups


def one_group(encoding: Encoding, columns: int) -> int:
    """`PackedWeight.group` of a weight that has one scale for each output channel."""
    if encoding in FP4_GROUPS:
        return FP4_GROUPS[encoding]
    return columns if encoding in ("int8", "int4") and columns in GROUPS else 0


def _weight(
    encoding: Encoding, values: Tensor, group: int, scale: Tensor, zero: Tensor | None
) -> PackedWeight:
    op = f"pack_{encoding}"
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(f"{op}: scale is {scale.dtype}, not one of {SCALE_DTYPES}")
    if not scale.isfinite().all():
        raise ValueError(f"{op}: scale is not finite")
    return _packed(encoding, values, group, scale, zero)


def _packed(
    encoding: Encoding, values: Tensor, group: int, scale: Tensor, zero: Tensor | None
) -> PackedWeight:
    shape = _shape(encoding, values)
    width = values.shape[-1] * values.itemsize
    rows = values.contiguous().flatten().view(torch.uint8).view(*values.shape[:-1], width)
    padded = shape[-1] + -shape[-1] % (group or BLOCK)
    return PackedWeight(
        encoding=encoding,
        shape=shape,
        group=group,
        packed=_panels(rows, encoding, padded * BITS[encoding] // 8),
        scale=_lanes(scale),
        zero=None if zero is None else _lanes(zero),
    )


def _panels(rows: Tensor, encoding: Encoding, line: int) -> Tensor:
    """`PackedWeight.packed`. Shapes: rows [..., N, bytes]; line: bytes of a padded row."""
    if env.kernels() == "reference" or rows.device.type != "cpu":
        return reference.panels(rows, encoding, line)
    native.load()
    *lead, N, width = rows.shape
    matrices = rows.view(lead[0] if lead else 1, N, width)
    packed = torch.ops.qwen3next.pack_panels(matrices, ENCODINGS.index(encoding), line)
    return packed if lead else packed[0]


def _lanes(x: Tensor) -> Tensor:
    """[..., N, groups] as [..., panels, groups, 16], padded with zeros."""
    padded = pad(x, (0, 0, 0, -x.shape[-2] % PANEL))
    return padded.unflatten(-2, (-1, PANEL)).transpose(-1, -2).contiguous()
