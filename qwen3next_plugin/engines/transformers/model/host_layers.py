"""The host's projections as the neutral layers take them: packed copies, several as one."""

from typing import Any

import torch
from torch import Tensor, nn

from qwen3next_plugin.kernels.silu_and_mul import silu_and_mul
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.quantisation.packing import pack_plain

# A stacked projection's parts, by its name; in Qwen3-Next's checkpoints the last two are whole.
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


class Projection(nn.Module):
    """x Wᵀ with packed copies of one weight or several, which have the same columns."""

    def __init__(self, *weights: Tensor, bias: Tensor | None = None) -> None:
        """Shapes: weights [N, D] each, bias of all channels"""
        super().__init__()
        self.packed, self.bias = pack_plain(torch.cat(weights)), bias

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Shapes: x [T, D], returns [T, channels]"""
        return self.packed(x, self.bias), None


def host_layers(of_host: nn.Module) -> HostLayers:
    """Those of a layer of the host's, by their names."""

    def build(*_: Any, prefix: str, **__: Any) -> Projection:
        name = prefix.rpartition(".")[2]
        parts = (name,) if hasattr(of_host, name) else PARTS[name]
        layers: list[Any] = [of_host.get_submodule(part) for part in parts]
        for part, layer in zip(parts, layers, strict=True):
            if type(layer) is not nn.Linear:
                raise NotImplementedError(
                    f"QWEN3NEXT_BATCH_INVARIANT=1: {part} is a {type(layer).__name__}; only plain "
                    f"weights have the engines' bits: merge adapters, load weights in bfloat16"
                )
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        return Projection(*(layer.weight for layer in layers), bias=bias)

    return HostLayers(
        column_parallel=build,
        merged_column_parallel=build,
        qkv_parallel=build,
        row_parallel=build,
        replicated=build,
        silu_and_mul=lambda: silu_and_mul,
    )
