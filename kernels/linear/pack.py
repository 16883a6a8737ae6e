"""Packs values and scales, as checkpoints have them, into a `PackedWeight`."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3next_plugin.kernels.linear.packed_weight import (
    BLOCK,
    PANEL,
    SCALES,
    Encoding,
    PackedWeight,
)

GROUPS = (32, 64, 128)


def pack_int8(values: Tensor, scale: Tensor) -> PackedWeight:
    """Symmetric int8, one scale for each output channel or group.

    Shapes: values [..., N, K] int8; scale [..., N, 1] or [..., N, K / group], group 32, 64 or 128.
        One leading dim is of experts.

    Raises: ValueError for a dtype, a shape, a group that does not divide K, a scale that is not
        finite.
    """
    _check_values("pack_int8", values, torch.int8)
    group = _group("pack_int8", values, scale)
    pairs = _columns_in(values, group).unflatten(-1, (-1, 2))  # [..., panels, 16, K / 2, 2]
    return _weight("int8", values, group, pairs.transpose(-3, -2), scale, None)


def pack_int4(values: Tensor, scale: Tensor, zero: Tensor | None = None) -> PackedWeight:
    """int4, values and zero points 0 to 15, one scale for each output channel or group.

    Shapes: values [..., N, K] uint8; scale, zero [..., N, 1] or [..., N, K / group]. `zero` is
        uint8; None: 8.

    Raises: as `pack_int8`; ValueError for a value or zero point above 15.
    """
    op = "pack_int4"
    _check_values(op, values, torch.uint8)
    group = _group(op, values, scale)
    for name, x in (("values", values), ("zero", zero)):
        if x is not None and x.numel() and int(x.max()) > 15:
            raise ValueError(f"{op}: {name} has {int(x.max())}; 4 bits hold 0 to 15")
    if zero is not None and (zero.dtype != torch.uint8 or zero.shape != scale.shape):
        raise ValueError(
            f"{op}: zero is {zero.dtype} {tuple(zero.shape)}, not torch.uint8 {tuple(scale.shape)}"
        )
    n = _columns_in(values, group).unflatten(-1, (-1, 2, 2, 2))  # [..., K / 8, words' bytes, 2, 2]
    octets = (
        n[..., 0, :] | n[..., 1, :] << 4
    )  # [..., panels, 16, K / 8, byte of a word, column % 2]
    lines = octets.transpose(-1, -2).movedim(-4, -3)  # [..., panels, K / 8, 16, 2, bytes]
    return _weight("int4", values, group, lines, scale, zero)


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
    codes = values.view(torch.uint8)
    if ((codes & 127) == 127).any():
        raise ValueError(f"{op}: values has NaN")
    if scale.shape == blocks:
        scale, group = scale.repeat_interleave(BLOCK, -2)[..., :N, :], BLOCK
    elif scale.shape in ((*lead, N, blocks[-1]), (*lead, N, 1)):
        group = BLOCK if scale.shape[-1] > 1 else 0
    else:
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)}, not {blocks}, {(*lead, N, blocks[-1])} or"
            f" {(*lead, N, 1)}"
        )
    quads = _columns_in(codes, group).unflatten(
        -1, (-1, 2, 2)
    )  # [..., 16, K / 4, byte, column % 2]
    lines = quads.transpose(-1, -2).movedim(-4, -3)  # [..., panels, K / 4, 16, 2, bytes]
    return _weight("fp8", values, group, lines, scale, None)


def pack_bf16(values: Tensor) -> PackedWeight:
    """The matrix itself.

    Shapes: values [..., N, K] bf16. One leading dim is of experts.

    Raises: ValueError for a dtype or a shape.
    """
    _check_values("pack_bf16", values, torch.bfloat16)
    pairs = _columns_in(values, 0).unflatten(-1, (-1, 2))  # [..., panels, 16, K / 2, 2]
    none = values.new_empty(*values.shape[:-1], 0)
    return _weight("bf16", values, 0, pairs.transpose(-3, -2), none, None)


def _check_values(op: str, values: Tensor, dtype: torch.dtype) -> None:
    if values.dtype != dtype or values.dim() not in (2, 3):
        raise ValueError(
            f"{op}: values is {values.dtype} {tuple(values.shape)}, not {dtype} [N, K] or [E, N, K]"
        )


def _group(op: str, values: Tensor, scale: Tensor) -> int:
    """Columns that share a scale; 0: all."""
    *lead, N, K = values.shape
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


def _columns_in(values: Tensor, group: int) -> Tensor:
    """Values padded to whole groups and panels: [..., panels, 16, K]."""
    N, K = values.shape[-2:]
    padded = pad(values, (0, -K % (group or BLOCK), 0, -N % PANEL))
    return padded.unflatten(-2, (-1, PANEL))


def _weight(
    encoding: Encoding,
    values: Tensor,
    group: int,
    lines: Tensor,
    scale: Tensor,
    zero: Tensor | None,
) -> PackedWeight:
    op = f"pack_{encoding}"
    if scale.dtype not in SCALES:
        raise ValueError(f"{op}: scale is {scale.dtype}, not one of {SCALES}")
    if not scale.isfinite().all():
        raise ValueError(f"{op}: scale is not finite")
    lead = values.dim() - 2
    return PackedWeight(
        encoding=encoding,
        shape=tuple(values.shape),
        group=group,
        packed=lines.contiguous().view(torch.uint8).flatten(lead + 1),
        scale=_lanes(scale),
        zero=None if zero is None else _lanes(zero),
    )


def _lanes(x: Tensor) -> Tensor:
    """[..., N, groups] as [..., panels, groups, 16], padded with zeros."""
    padded = pad(x, (0, 0, 0, -x.shape[-2] % PANEL))
    return padded.unflatten(-2, (-1, PANEL)).transpose(-1, -2).contiguous()
