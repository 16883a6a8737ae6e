"""How checkpoints store FP4: NVFP4 and MXFP4.

Two e2m1 a byte, the lower nibble first. NVFP4 has an e4m3 scale for each 16 columns and a scale of
the whole module, by which modelopt and Quark multiply and compressed-tensors divides. MXFP4, of the
last two, has an e8m0 scale for each 32 columns. Scales of 4-bit activations are not used, because
activations stay as they are.
"""

from typing import Literal

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import FP4_GROUPS, FP4_SCALES
from qwen3next_plugin.model.quantisation.format import (
    CHANNEL_SCALE,
    Format,
    Module,
    Scheme,
    Tensors,
)

VALUES = (("weight", torch.uint8), ("weight_packed", torch.uint8))
FACTOR, DIVISOR = "weight_scale_2", "weight_global_scale"  # of the whole module
OF_ACTIVATIONS = ("input_scale", "input_scale_2", "input_global_scale")
E8M0 = (torch.uint8, FP4_SCALES["mxfp4"])


def scheme(tensors: Tensors) -> Scheme:
    """The scheme of a module with these tensors, one of which is in VALUES."""
    values = "weight_packed" if "weight_packed" in tensors else "weight"
    whole = DIVISOR if values == "weight_packed" else FACTOR
    scale, e4m3 = tensors.get("weight_scale"), FP4_SCALES["nvfp4"]
    if whole in tensors or (scale is not None and scale.dtype == e4m3):
        needs = (values, "weight_scale", whole)
        return Scheme(needs, OF_ACTIVATIONS, _nvfp4, _read_nvfp4, (e4m3,))
    return Scheme((values, "weight_scale"), OF_ACTIVATIONS, _mxfp4, _read_mxfp4, E8M0)


def _nvfp4(module: Module) -> Format:
    for name in (FACTOR, DIVISOR):
        module.check_shape(name, (), (1,))
    return _format(module, "nvfp4")


def _mxfp4(module: Module) -> Format:
    return _format(module, "mxfp4")


def _format(module: Module, encoding: Literal["nvfp4", "mxfp4"]) -> Format:
    N, K, group = module.channels, module.columns, FP4_GROUPS[encoding]
    for name, _ in VALUES:
        module.check_shape(name, (N, K // 2))
    if K % group or module.shape("weight_scale") != (N, K // group):
        raise module.refuse(
            f"weight_scale has shape {module.shape('weight_scale')}, which is no scale of each "
            f"{group} of {K} columns of {N} output channels",
            f"use a checkpoint with a scale of each {group} columns",
        )
    return Format(encoding, group, FP4_SCALES[encoding])


def _read_nvfp4(module: Module) -> dict[str, Tensor]:
    if (divisor := module.tensors.get(DIVISOR)) is not None:
        factor = 1 / divisor.float()
    else:
        factor = module.tensors[FACTOR].float()
    if not factor.isfinite():
        raise module.refuse(
            f"the scale of the whole module is {factor.item()}", "download the checkpoint again"
        )
    return _read_mxfp4(module) | {CHANNEL_SCALE: factor.expand(module.channels, 1).contiguous()}


def _read_mxfp4(module: Module) -> dict[str, Tensor]:
    scale = module.tensors["weight_scale"]
    values = module.tensors.get("weight_packed", module.tensors.get("weight"))
    assert values is not None
    return {
        "weight": values,
        "weight_scale": scale.view(FP4_SCALES["mxfp4"]) if scale.dtype in E8M0 else scale,
    }
