"""Packing on a CPU: of unquantised projections, for our kernel."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform

from qwen3next_plugin.engines.vllm.cpu.packed import PackedExperts
from qwen3next_plugin.model.packed import pack_plain, packs_plain


def _packs(layer: nn.Module) -> bool:
    """Whether our kernel multiplies by the layer's weight, and not vLLM's."""
    ours = current_platform.is_cpu() and packs_plain()
    return ours and layer.weight.dtype == torch.bfloat16


class PackedProjection(UnquantizedLinearMethod):
    """vLLM's unquantised projection, with our product."""

    def __init__(self, *, as_int8: bool = False) -> None:
        super().__init__()
        self.as_int8 = as_int8

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = pack_plain(layer, as_int8=self.as_int8)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.packed(x, bias)


def use_packing(model: nn.Module, drafting: nn.Module | None = None) -> None:
    """Make vLLM pack a model's unquantised projections for our kernel, where that is chosen.

    Those in `drafting`, but for routers, and its experts become int8: a draft is bound by reading
    weights, and one that is wrong costs speed alone.
    """
    within = set() if drafting is None else set(drafting.modules())
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if type(method) is UnquantizedLinearMethod and _packs(layer):
            as_int8 = layer in within and not isinstance(layer, GateLinear)
            layer.quant_method = PackedProjection(as_int8=as_int8)
        elif isinstance(method, PackedExperts):
            method.drafts = layer in within
