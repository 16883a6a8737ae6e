"""Our experts' kernels in SGLang's MoE, in place of its loop over experts on a CPU."""

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import CombineInput, StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import use_intel_amx_backend
from torch import nn

from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import PackedWeight
from qwen3next_plugin.kernels.linear.packed_weight import PANEL
from qwen3next_plugin.model.quantisation.layers import (
    BF16_EXPERTS,
    ExpertsMethod,
    Packing,
    pack_experts,
)
from qwen3next_plugin.model.quantisation.packed import packs_plain


class NativeExperts(Packing, UnquantizedFusedMoEMethod):
    """SGLang's unquantised experts; SGLang's AMX kernel stays if it has packed the weights."""

    as_int8 = False  # pack what is in bf16 as int8

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "w2_packed") or use_intel_amx_backend(layer):
            return
        super().process_weights_after_loading(layer)
        w2 = layer.w2_weight
        if use_intel_amx_backend(layer) or w2.shape[-1] % PANEL:
            return
        if packs_plain(w2.dtype):
            pack_experts(layer, BF16_EXPERTS, as_int8=self.as_int8)

    def forward_cpu(
        self, layer: nn.Module, dispatch_output: StandardDispatchOutput
    ) -> CombineInput:
        """Shapes: hidden_states [T, D], w13_weight [E, 2I, D], w2_weight [E, D, I]."""
        if use_intel_amx_backend(layer):
            return super().forward_cpu(layer, dispatch_output)
        topk = dispatch_output.topk_output
        w13, w2 = (_weight(layer, which) for which in ("w13", "w2"))
        return StandardCombineInput(
            hidden_states=fused_moe(
                x=dispatch_output.hidden_states,
                w13=w13,
                w2=w2,
                topk_weights=topk.topk_weights.float(),
                topk_ids=topk.topk_ids.int(),
            )
        )

    forward_native = forward_cpu  # the name that SGLang calls without AMX


def _weight(layer: Any, which: str) -> torch.Tensor | PackedWeight:
    packed = getattr(layer, f"{which}_packed", None)
    return getattr(layer, f"{which}_weight") if packed is None else packed.weight


class PackedExperts(ExpertsMethod, FusedMoEMethodBase):
    """Experts of a quantised checkpoint."""

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """None: our kernel is called directly."""

    def apply(self, layer: Any, dispatch_output: StandardDispatchOutput) -> CombineInput:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        return StandardCombineInput(
            hidden_states=self.multiply(layer, x, topk.topk_weights, topk.topk_ids)
        )
