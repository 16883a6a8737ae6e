"""Our experts' kernel in vLLM's MoE, in place of vLLM's portable CPU kernel.

vLLM's AMX kernel is kept on processors with AMX. Elsewhere vLLM's portable kernel converts every
weight to fp32, which takes half of a prefill's time. The router, the shared expert and the loading
of weights stay vLLM's. Our kernel reads the weights as the checkpoint stores them, unpacked.
"""

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

from qwen3next_plugin.kernels.fused_moe import fused_moe


def on_this_rank(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's own index of each expert; the weight of one that it has not is zero.

    Shapes: topk_* [T, k], expert_map [experts of the model], -1 where the rank has none
    """
    if expert_map is None:
        return topk_weights, topk_ids
    topk_ids = expert_map[topk_ids.long()]
    return topk_weights.masked_fill(topk_ids < 0, 0), topk_ids.clamp(min=0)


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
        topk_weights, topk_ids = on_this_rank(topk_weights, topk_ids, expert_map)
        output.copy_(
            fused_moe(
                x=hidden_states,
                w13=w1,
                w2=w2,
                topk_weights=topk_weights.float(),
                topk_ids=topk_ids.int(),
            )
        )


class Experts(RoutedExperts):
    """vLLM's container of the experts' weights, with our kernel instead of the portable one."""

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        portable = isinstance(method, UnquantizedFusedMoEMethod) and (
            method.experts_cls is CPUUnquantizedExperts
        )
        if portable:
            method.experts_cls = NativeExperts
        return method
