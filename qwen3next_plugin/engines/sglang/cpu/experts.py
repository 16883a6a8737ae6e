"""Our experts' kernels in SGLang's MoE, in place of its loop over experts on a CPU."""

from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher import CombineInput, StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import cpu_has_amx_support, use_intel_amx_backend
from torch import nn

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import PackedWeight
from qwen3next_plugin.kernels.linear.packed_weight import PANEL
from qwen3next_plugin.model.quantisation.layers import ExpertsMethod
from qwen3next_plugin.model.quantisation.packing import BF16_EXPERTS, PackingExperts, packs_plain


class NativeExperts(PackingExperts, UnquantizedFusedMoEMethod):
    """SGLang's unquantised experts; SGLang's AMX kernel stays if it has packed the weights."""

    formats = BF16_EXPERTS

    def may_pack(self, layer: Any) -> bool:
        return not cpu_has_amx_support() and _has_all(layer) and _packs(layer.w2_weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "w2_packed") or use_intel_amx_backend(layer):
            return
        if self.stacks is None:
            super().process_weights_after_loading(layer)
        if not use_intel_amx_backend(layer) and _packs(layer.w2_weight):
            self.pack_experts(layer)

    @override(
        "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod.forward_cpu",
        reason="without AMX, SGLang loops over the experts",
        remove_when="SGLang has fused experts for any CPU",
    )
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


def _packs(w2: torch.Tensor) -> bool:
    """Whether our kernels take such experts packed. Shapes: w2 [E, D, I]."""
    return w2.shape[-1] % PANEL == 0 and packs_plain(w2.dtype)


def _has_all(layer: Any) -> bool:
    """Whether this rank has every expert."""
    return layer.moe_ep_size == 1


def _weight(layer: Any, which: str) -> torch.Tensor | PackedWeight:
    packed = getattr(layer, f"{which}_packed", None)
    return getattr(layer, f"{which}_weight") if packed is None else packed.weight


class PackedExperts(ExpertsMethod, FusedMoEMethodBase):
    """Experts of a quantised checkpoint."""

    def may_pack(self, layer: Any) -> bool:
        return _has_all(layer)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """None: our kernel is called directly."""

    def apply(self, layer: Any, dispatch_output: StandardDispatchOutput) -> CombineInput:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        return StandardCombineInput(
            hidden_states=self.multiply(layer, x, topk.topk_weights, topk.topk_ids)
        )
