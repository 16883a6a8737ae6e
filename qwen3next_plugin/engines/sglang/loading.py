"""A checkpoint's tensors into SGLang's parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.")
SHARDS = {"gate": ("w13_", "w1"), "up": ("w13_", "w3"), "down": ("w2_", "w2")}


def load(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    stacked: Mapping[str, tuple[str, str | int]],
) -> None:
    """Give each tensor to the parameter that holds it, or its part of a stacked one."""
    parameters: dict[str, Any] = dict(model.named_parameters())  # with a loader as an attribute
    for name, tensor in tensors:
        if expert := EXPERT.search(name):
            holder, which = SHARDS[expert[2]]
            name = EXPERT.sub(f".experts.{holder}", name)
            parameter = parameters[name]
            parameter.weight_loader(
                parameter, tensor, name, shard_id=which, expert_id=int(expert[1])
            )
            continue
        part = next((key for key in stacked if f"{key}." in name), None)
        if part is not None:
            whole, shard = stacked[part]
            parameter = parameters[name.replace(part, whole)]
            parameter.weight_loader(parameter, tensor, shard)
            continue
        parameter = parameters[name]
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
