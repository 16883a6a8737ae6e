"""A plain weight in int8 or int4, without calibration."""

import torch
from torch import Tensor

from qwen3next_plugin.model.quantisation.format import Format, joined

SMALLEST = 1e-8  # a scale: of weights that are all zeros
# What scales of int4 reach, over the largest weight of a group. Reaching it alone leaves 12 % more
# squared error on the shipped checkpoint; 23 instead of these four would leave 1.3 % less.
REACHES = (0.97, 0.89, 0.81, 0.73)
CHUNK = 1 << 17  # weights at a time, which stay in a core's cache


def quantise(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """Round a weight to int8, or to int4 in groups without zero points.

    Shapes: weight [N, K], returns those of `Format.tensors(N, K)`
    """
    if form.encoding == "int8":
        return _int8(weight, form)
    N, K = weight.shape
    values = torch.empty(N, K // 2, dtype=torch.uint8)
    scale = torch.empty(N, K // form.group, dtype=form.scale)
    rows = max(1, CHUNK // K)
    for begin in range(0, N, rows):
        here = slice(begin, begin + rows)
        grouped = weight[here].float().unflatten(1, (-1, form.group))
        scale[here] = _scale(grouped)
        steps = _steps(grouped, scale[here].float().reciprocal())
        values[here] = joined(steps.add_(8).flatten(1).to(torch.uint8))
    return {"weight": values, "weight_scale": scale}


def _int8(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """The largest weight of a group is 127 times the scale."""
    grouped = weight.float().unflatten(1, (-1, form.group or weight.shape[1]))
    scale = (grouped.abs().amax(dim=-1) / 127).clamp(min=SMALLEST)
    values = (grouped / scale[..., None]).round().flatten(1).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(form.scale)}


def _scale(grouped: Tensor) -> Tensor:
    """The scales of int4 with the least squared error.

    For the steps q of weights w, the best scale is <w, q> / <q, q>, which leaves an error of
    <w, w> - <w, q>² / <q, q>. Tries the steps of the scales in REACHES.

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
