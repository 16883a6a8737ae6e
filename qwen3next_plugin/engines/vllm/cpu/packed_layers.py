"""Layers on a CPU whose weights are packed for our kernels.

Of its own, vLLM packs a matrix-product copy of each vocabulary layer's weight and keeps the plain
weight too. An embedding is only looked up and needs no packed copy; a head is only multiplied and
needs no plain one. With a vocabulary of 151,936 and 2048 dims that saves 1.2 GB. On other devices
nothing is packed and these methods change nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from qwen3next_plugin.model.quantisation.format import Format
from qwen3next_plugin.model.quantisation.layers import ExpertsMethod, LinearMethod, each_layer
from qwen3next_plugin.model.quantisation.packed import (
    drop_plain,
    pack_plain,
    packs_plain,
)

if TYPE_CHECKING:
    pass


def method_for(
    layer: nn.Module, prefix: str, found: Mapping[str, Format] | None
) -> QuantizeMethodBase | None:
    """How vLLM runs a layer whose weights have these formats; None: it is not quantised."""
    if isinstance(layer, RoutedExperts):
        return PackedExperts(layer.moe_config, prefix, found) if found else None
    if isinstance(layer, LinearBase):
        return PackedLinear(prefix, found["weight"]) if found else UnquantizedLinearMethod()
    return None


def use_packing(model: nn.Module, drafting: nn.Module | None = None) -> None:
    """Make vLLM pack a model's unquantised projections for our kernels, where these are chosen."""
    for layer, as_int8 in each_layer(model, drafting):
        method = getattr(layer, "quant_method", None)
        if type(method) is UnquantizedLinearMethod and current_platform.is_cpu():
            if packs_plain(layer.weight.dtype):
                layer.quant_method = PackedProjection(as_int8=as_int8)
        elif isinstance(method, PackedExperts):
            method.as_int8 = as_int8


class PackedLinear(LinearMethod, LinearMethodBase):
    """A projection of a quantised checkpoint."""


class PackedExperts(ExpertsMethod, FusedMoEMethodBase):
    """Experts, quantised or in bf16."""

    def __init__(self, moe: FusedMoEConfig, module: str, formats: Mapping[str, Format]) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        ExpertsMethod.__init__(self, module, formats, moe.intermediate_size)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: our kernel asks vLLM for nothing."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shapes: x [T, D], topk_* [T, k], returns [T, D]."""
        return self.multiply(layer, x, *on_this_rank(topk_weights, topk_ids, layer.expert_map))


def on_this_rank(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's own index of each expert; an expert that it lacks gets weight zero.

    Shapes: topk_* [T, k], expert_map [experts of the model], -1 where the rank has none
    """
    if expert_map is None:
        return topk_weights, topk_ids
    topk_ids = expert_map[topk_ids.long()]
    return topk_weights.masked_fill(topk_ids < 0, 0), topk_ids.clamp(min=0)


class PackedProjection(UnquantizedLinearMethod):
    """vLLM's unquantised projection, with our product."""

    def __init__(self, *, as_int8: bool) -> None:
        super().__init__()
        self.as_int8 = as_int8

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = pack_plain(layer.weight.data, as_int8=self.as_int8)
        drop_plain(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.packed(x, bias)
