"""A checkpoint's tensors into SGLang's parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from qwen3next_plugin.model.weights import STACKED_PROJECTIONS, CheckpointError, check_scales

# A stacked projection's parts, by the names that quantisation configs use.
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
# SGLang's weight updates ask a model for a reason to refuse, and answer with it.
NO_UPDATES = (
    "qwen3next_plugin checks, packs and copies weights as a whole checkpoint loads; restart the "
    "server with the new checkpoint"
)
EXPERT = re.compile(r"\.experts\.(\d+)\.(gate|up|down)_proj\.")
SHARDS = {"gate": ("w13_", "w1"), "up": ("w13_", "w3"), "down": ("w2_", "w2")}


def load(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load each tensor into its parameter, or into its part of a stacked one."""
    parameters: dict[str, Any] = dict(model.named_parameters())  # Any: loaders are attributes
    loaded: set[str] = set()
    for name, tensor in tensors:
        if expert := EXPERT.search(name):
            holder, which = SHARDS[expert[2]]
            name = EXPERT.sub(f".experts.{holder}", name)
            parameter = _find(parameters, name, loaded)
            parameter.weight_loader(
                parameter, tensor, name, shard_id=which, expert_id=int(expert[1])
            )
            continue
        part = next((key for key in STACKED_PROJECTIONS if f"{key}." in name), None)
        if part is not None:
            whole, shard = STACKED_PROJECTIONS[part]
            parameter = _find(parameters, name.replace(part, whole), loaded)
            parameter.weight_loader(parameter, tensor, shard)
            continue
        parameter = _find(parameters, name, loaded)
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
    check_scales(parameters, loaded)


def _find(parameters: Mapping[str, Any], name: str, loaded: set[str]) -> Any:
    """The parameter of that name; notes it as loaded."""
    if name not in parameters:
        raise CheckpointError(
            f"tensor {name}: the config's quantization_config leaves this layer unquantised, and "
            f"the checkpoint does not"
        )
    loaded.add(name)
    return parameters[name]
