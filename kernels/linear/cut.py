"""A part of a packed weight: the output channels and columns of one tensor-parallel rank."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwen3next_plugin.kernels.linear.pack import one_group
from qwen3next_plugin.kernels.linear.packed_weight import (
    BEFORE,
    BITS,
    PANEL,
    PackedWeight,
    packed_shapes,
)

Run = tuple[int, int]  # of channels or columns: the first, and the one behind the last


def cut(weight: PackedWeight, channels: Sequence[Run], columns: Run) -> PackedWeight:
    """Runs of output channels, one after the other, in one run of columns.

    Channels beyond the last are zero. One run of whole panels shares the weight's memory.

    Raises: ValueError for columns that begin or end within a group, or within what is interleaved.
    """
    *lead, N, K = weight.shape
    channels = _joined(channels)
    if channels == [(0, N)] and columns == (0, K):
        return weight
    begin, end = columns
    step = weight.group or K  # columns that share a scale
    lane = 2 if weight.encoding == "int8" else 4  # bytes of a channel that lie side by side
    width = 8 * lane // BITS[weight.encoding]  # columns in them
    together = width if step == K else step
    if any(bound % together and bound != K for bound in columns):
        raise ValueError(
            f"cut: columns {begin} to {end} of {weight.encoding} weights with a scale for {step} "
            f"columns: {together} stay together"
        )
    shape = (*lead, sum(stop - start for start, stop in channels), end - begin)
    group = step if end - begin > step else one_group(weight.encoding, end - begin)
    line = packed_shapes(weight.encoding, shape, group)[0][-1]
    lanes = weight.packed.unflatten(-1, (-1, PANEL, lane))  # [..., panels, n, 16, lane]
    packed = _runs(lanes[..., begin // width : -(-end // width), :, :], channels).flatten(-3)
    packed = packed[..., :line]
    if packed.shape[-1] < line:
        packed = pad(packed, (0, line - packed.shape[-1]))

    def entries(x: Tensor) -> Tensor:
        part = x[..., begin // step : -(-end // step), :]
        return _runs(part[..., None], channels).squeeze(-1).contiguous()

    scale = weight.scale
    if weight.encoding == "nvfp4":
        before = scale[..., :BEFORE, :].flatten(-2).view(torch.float32)[..., None, :, None]
        before = _runs(before, channels).flatten(-3).contiguous().view(torch.uint8)
        of_groups = entries(scale[..., BEFORE:, :])
        scale = torch.cat([before.unflatten(-1, (BEFORE, PANEL)), of_groups], dim=-2)
    else:
        scale = entries(scale)

    return replace(
        weight,
        shape=shape,
        group=group,
        packed=packed.contiguous(),
        scale=scale,
        zero=None if weight.zero is None else entries(weight.zero),
    )


def _joined(runs: Sequence[Run]) -> list[Run]:
    """The same, with those joined of which one begins where the other ends."""
    joined = [*runs[:1]]
    for start, stop in runs[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _runs(x: Tensor, channels: Sequence[Run]) -> Tensor:
    """Runs of output channels. Shapes: x and what it returns [..., panels, n, 16, lane]"""
    beyond = max(stop for _, stop in channels) - PANEL * x.shape[-4]
    if beyond > 0:
        x = pad(x, (0, 0, 0, 0, 0, 0, 0, -(-beyond // PANEL)))
    if all(bound % PANEL == 0 for run in channels for bound in run):
        runs = [x[..., start // PANEL : stop // PANEL, :, :, :] for start, stop in channels]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=-4)
    rows = x.transpose(-3, -2).flatten(-4, -3)  # [..., channels, n, lane]
    rows = torch.cat([rows[..., start:stop, :, :] for start, stop in channels], dim=-3)
    rows = pad(rows, (0, 0, 0, 0, 0, -rows.shape[-3] % PANEL))
    return rows.unflatten(-3, (-1, PANEL)).transpose(-3, -2)
