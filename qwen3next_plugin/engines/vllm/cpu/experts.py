"""Our experts' kernels in vLLM's MoE: of packed weights, and in place of vLLM's portable kernel.

vLLM's portable kernel converts every weight to fp32, which takes half of a prefill's time. Where
weights are not packed, ours reads them as the checkpoint stores them. vLLM loads both.
"""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear.packed_weight import PANEL
from qwen3next_plugin.model.moe import on_this_rank
from qwen3next_plugin.model.quantisation.format import Format
from qwen3next_plugin.model.quantisation.layers import ExpertsMethod
from qwen3next_plugin.model.quantisation.packing import BF16_EXPERTS, packs_plain


class NativeExperts(CPUUnquantizedExperts):
    """Replaces vLLM's portable kernel."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack nothing."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *_: object,
        **__: object,
    ) -> None:
        """Shapes: output, hidden_states [T, D], w1 [E, 2I, D], w2 [E, D, I], topk_* [T, k].

        expert_map [experts of the model]: this rank's index of each expert, -1 if it has none.
        """
        assert activation == MoEActivation.SILU
        output.copy_(
            fused_moe(
                x=hidden_states,
                w13=w1,
                w2=w2,
                topk_weights=topk_weights.float(),
                topk_ids=on_this_rank(topk_ids, expert_map),
            )
        )


class PackedExperts(ExpertsMethod, FusedMoEMethodBase):
    """Experts, quantised or in bf16."""

    def __init__(self, moe: FusedMoEConfig, module: str, formats: Mapping[str, Format]) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        ExpertsMethod.__init__(self, module, formats, moe.intermediate_size)

    def may_pack(self, layer: RoutedExperts) -> bool:
        return layer.expert_map is None

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
        return self.multiply(layer, x, topk_weights, on_this_rank(topk_ids, layer.expert_map))


class Experts(RoutedExperts):
    """vLLM's container of the experts' weights, with our kernels."""

    @override(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method."
        "UnquantizedFusedMoEMethod.experts_cls",
        reason="vLLM's portable experts convert each weight to fp32",
        remove_when="vLLM's portable experts are as fast",
    )
    @override(
        "vllm.model_executor.layers.fused_moe.routed_experts.RoutedExperts._get_quant_method",
        reason="vLLM's portable experts convert each weight to fp32, which takes half of a "
        "prefill's time; ours multiply bf16",
        remove_when="vLLM's portable experts are as fast",
    )
    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        if not current_platform.is_cpu() or not isinstance(method, UnquantizedFusedMoEMethod):
            return method
        if self._are_packed(moe_config):
            return PackedExperts(moe_config, prefix, BF16_EXPERTS)
        if method.experts_cls is CPUUnquantizedExperts:
            method.experts_cls = NativeExperts
        return method

    @staticmethod
    def _are_packed(moe_config: FusedMoEConfig) -> bool:
        """Whether our packed kernel runs the experts; vLLM can rebalance only unpacked ones."""
        return (
            packs_plain(moe_config.in_dtype)
            and moe_config.intermediate_size_per_partition % PANEL == 0
            and not moe_config.moe_parallel_config.enable_eplb
        )
