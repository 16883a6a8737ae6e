"""A checkpoint's tensors into SGLang's parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from qwen3next_plugin.model.weights import CheckpointError, check_scales

EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.")
SHARDS = {"gate": ("w13_", "w1"), "up": ("w13_", "w3"), "down": ("w2_", "w2")}


def load(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    stacked: Mapping[str, tuple[str, str | int]],
) -> None:
    """Give each tensor to the parameter that holds it, or its part of a stacked one."""
    parameters: dict[str, Any] = dict(model.named_parameters())  # with a loader as an attribute
    loaded: set[str] = set()
    for name, tensor in tensors:
        if expert := EXPERT.search(name):
            holder, which = SHARDS[expert[2]]
            name = EXPERT.sub(f".experts.{holder}", name)
            parameter = _of(parameters, name, loaded)
            parameter.weight_loader(
                parameter, tensor, name, shard_id=which, expert_id=int(expert[1])
            )
            continue
        part = next((key for key in stacked if f"{key}." in name), None)
        if part is not None:
            whole, shard = stacked[part]
            parameter = _of(parameters, name.replace(part, whole), loaded)
            parameter.weight_loader(parameter, tensor, shard)
            continue
        parameter = _of(parameters, name, loaded)
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
    check_scales(parameters, loaded)


def _of(parameters: Mapping[str, Any], name: str, loaded: set[str]) -> Any:
    """The parameter of that name, which is loaded now."""
    if name not in parameters:
        raise CheckpointError(
            f"tensor {name}: the config's quantization_config leaves this layer unquantised, and "
            f"the checkpoint does not"
        )
    loaded.add(name)
    return parameters[name]
