"""A plain weight in int8 or int4, without calibration."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import ACTIVATIONS
from qwen3next_plugin.kernels.linear import quantise_int4
from qwen3next_plugin.kernels.linear.reference import SMALLEST
from qwen3next_plugin.model.quantisation.format import Format


def quantise(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """Round a weight to int8, or to int4 in groups without zero points.

    Shapes: weight [N, K], returns those of `Format.tensors(N, K)`
    """
    if form.encoding == "int8":
        return _int8(weight, form)
    weight = weight if weight.dtype in ACTIVATIONS else weight.float()
    values, scale = quantise_int4(weight, form.group, form.scale)
    return {"weight": values, "weight_scale": scale}


def _int8(weight: Tensor, form: Format) -> dict[str, Tensor]:
    """The largest weight of a group is 127 times the scale."""
    grouped = weight.float().unflatten(1, (-1, form.group or weight.shape[1]))
    scale = (grouped.abs().amax(dim=-1) / 127).clamp(min=SMALLEST)
    values = (grouped / scale[..., None]).round().flatten(1).to(torch.int8)
    return {"weight": values, "weight_scale": scale.to(form.scale)}
