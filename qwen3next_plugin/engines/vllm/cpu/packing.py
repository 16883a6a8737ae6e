"""Packing on a CPU: of projections and head for our kernel, and without second copies.

vLLM packs a matrix-product copy of each vocabulary layer's weight and keeps the plain weight too.
An embedding is only looked up and needs no packed copy; a head is only multiplied and needs no
plain one. With a vocabulary of 151,936 and 2048 dims that saves 1.2 GB. On other devices nothing
is packed and these methods change nothing.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from qwen3next_plugin.engines.vllm.cpu.packed import PackedExperts
from qwen3next_plugin.model.packed import drop_plain, pack_head, pack_plain, packs_head, packs_plain

if TYPE_CHECKING:
    from qwen3next_plugin.engines.vllm.model.vocabulary import LMHead


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


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """vLLM's unquantised embedding, never packed."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack nothing."""


class PackedHead(UnquantizedEmbeddingMethod):
    """vLLM's unquantised head; the plain weight is kept only if it is the embedding too."""

    def __init__(self, *, tied: bool, drafts: bool) -> None:
        self.tied, self.drafts = tied, drafts

    def process_weights_after_loading(self, layer: "LMHead") -> None:
        if not current_platform.is_cpu():
            return
        ours = packs_head(layer.weight.dtype)
        if ours:
            layer.packed = pack_head(layer.weight.data)
        if self.drafts:
            layer.make_draft_head(stays=ours or self.tied)
        if not ours:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.tied)
        elif not self.tied:
            drop_plain(layer)

    def apply(
        self, layer: "LMHead", x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if layer.packed is None:
            return super().apply(layer, x, bias)
        return layer.packed(x, bias)
