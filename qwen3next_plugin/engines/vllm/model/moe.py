"""The mixture of experts, from vLLM's fused experts."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.models.utils import sequence_parallel_chunk
from vllm.platforms import current_platform

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.cpu.experts import Experts, PackedExperts
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.kernels.rms_norm import Unnormed, normed
from qwen3next_plugin.model.moe import make_shared_expert, packed_moe, route


class SparseMoE(nn.Module):
    """Top-k routed experts (softmax, top-k, renormalise) plus one gated shared expert."""

    def __init__(self, config: Qwen3NextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        parallel_config = vllm_config.parallel_config
        # With tensor, data and expert parallelism at once, a rank routes its share of the tokens.
        self.is_sequence_parallel = parallel_config.use_sequence_parallel_moe
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.n_routed_experts = config.num_experts
        self.n_redundant_experts = parallel_config.eplb_config.num_redundant_experts
        self.n_physical_experts = config.num_experts + self.n_redundant_experts
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        layers = host_layers(vllm_config, disable_tp=self.is_sequence_parallel)
        self.shared_expert_gate, self.shared_expert = make_shared_expert(
            config, layers, f"{prefix}.shared_expert"
        )
        with _without_lora(vllm_config):
            self.experts = FusedMoEFactory(
                shared_experts=self.shared_expert,
                gate=self.gate,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                renormalize=config.norm_topk_prob,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.experts",
                enable_eplb=parallel_config.enable_eplb,
                num_redundant_experts=self.n_redundant_experts,
                is_sequence_parallel=self.is_sequence_parallel,
                dp_size=parallel_config.data_parallel_size,  # 1 for a drafter's
                # On a GPU, vLLM's own router is one launch or part of the experts' kernel.
                custom_routing_function=route if current_platform.is_cpu() else None,
                routed_experts_cls=Experts,
            )
        self.n_local_physical_experts = self.experts.expert_map_manager.local_num_experts
        moe_config = self.experts.routed_experts.moe_config
        self.exchanges = moe_config.dp_size > 1 or moe_config.is_sequence_parallel

    def forward(self, x: torch.Tensor | Unnormed) -> torch.Tensor:
        """Shapes: x [T, D], returns [T, D]."""
        routed = self.experts.routed_experts
        if isinstance(routed.quant_method, PackedExperts) and not self.exchanges:
            # Skips vLLM's code for other kernels, and for ranks that have their own tokens.
            out = packed_moe(
                x,
                gate=self.gate,
                w13=routed.w13_packed.weight,
                w2=routed.w2_packed.weight,
                shared_expert=self.shared_expert,
                top_k=self.top_k,
                renormalise=self.renormalise,
                expert_map=routed.expert_map,
            )
            return tensor_model_parallel_all_reduce(out)
        hidden_states = x = normed(x)
        if self.is_sequence_parallel:
            x = sequence_parallel_chunk(x)
        # The experts hold the router: they compute its logits from the hidden states.
        out = self.experts(hidden_states=x, router_logits=x)
        if not self.is_sequence_parallel:
            return out
        return tensor_model_parallel_all_gather(out, 0)[: len(hidden_states)]


def describe_experts(model: Any, layers: Iterable[Any]) -> None:
    """Set the counts that vLLM balances experts by (its MixtureOfExperts protocol)."""
    moes = [layer.mlp for layer in layers if isinstance(getattr(layer, "mlp", None), SparseMoE)]
    model.expert_weights = []
    model.moe_layers = [moe.experts for moe in moes]
    model.num_moe_layers = len(moes)
    model.num_expert_groups = 1
    model.num_shared_experts = 0
    if moes:
        model.num_logical_experts = moes[0].n_routed_experts
        model.num_routed_experts = moes[0].n_routed_experts
        model.num_physical_experts = moes[0].n_physical_experts
        model.num_local_physical_experts = moes[0].n_local_physical_experts
        model.num_redundant_experts = moes[0].n_redundant_experts


@override(
    "vllm.config.vllm.VllmConfig.lora_config",
    reason="for a model with LoRA vLLM chooses Triton experts, also on a CPU",
    remove_when="vLLM asks the platform before it chooses",
)
def _without_lora(vllm_config: VllmConfig) -> AbstractContextManager:
    """On a CPU, build the experts as if there were no LoRA.

    vLLM would choose its LoRA experts, which are Triton kernels, for GPUs only; flags.py restricts
    adapters to the projections. Remove when vLLM asks the platform first.
    """
    if vllm_config.lora_config is None or not current_platform.is_cpu():
        return nullcontext()
    plain = copy(vllm_config)
    plain.lora_config = None
    return set_current_vllm_config(plain)
