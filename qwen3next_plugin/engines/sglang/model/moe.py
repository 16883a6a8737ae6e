"""The mixture of experts, from SGLang's fused experts."""

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import TopK, build_precomputed_topk_output
from sglang.srt.layers.moe.utils import RoutingMethodType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_parallel, get_server_args
from sglang.srt.utils import cpu_has_amx_support
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.cpu.experts import NativeExperts
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.kernels.rms_norm import Unnormed, normed
from qwen3next_plugin.model.moe import make_shared_expert, packed_moe, route


class SparseMoE(nn.Module):
    """Top-k routed experts (softmax, top-k, renormalise) plus one gated shared expert."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.tp_size = get_parallel().tp_size
        # SGLang has routers for GPUs and for AMX only.
        self.is_native = without_gpu() and not cpu_has_amx_support()
        args = get_server_args()
        self.is_recorded = bool(  # SGLang's code after the router records which experts are chosen
            args.enable_return_routed_experts or args.expert_distribution_recorder_mode
        )
        self.gate = ReplicatedLinear(
            config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate"
        )
        self.topk = TopK(
            config.num_experts_per_tok,
            layer_id=layer_id,
            renormalize=config.norm_topk_prob,
            custom_routing_function=route if self.is_native else None,
        )
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer_id,
            top_k=config.num_experts_per_tok,
            quant_config=quant_config,
            quant_method=NativeExperts() if quant_config is None and without_gpu() else None,
            routing_method_type=RoutingMethodType.RenormalizeNaive,
            inplace=False,  # the shared expert reads the hidden states afterwards
            prefix=f"{prefix}.experts",
        )
        self.topk.bind_runner_backend(
            self.experts.runner_backend, routing_method_type=self.experts.routing_method_type
        )
        self.shared_expert_gate, self.shared_expert = make_shared_expert(
            config, host_layers(quant_config), f"{prefix}.shared_expert"
        )

    def forward(self, x: torch.Tensor | Unnormed) -> torch.Tensor:
        """Shapes: x [T, D], returns [T, D]."""
        if hasattr(self.experts, "w2_packed") and not self.is_recorded:
            config = self.topk.topk_config
            out = packed_moe(
                x,
                gate=self.gate,
                w13=self.experts.w13_packed.weight,
                w2=self.experts.w2_packed.weight,
                shared_expert=self.shared_expert,
                top_k=config.top_k,
                renormalise=config.renormalize,
            )
        else:
            hidden_states = normed(x)
            router_logits, _ = self.gate(hidden_states)
            run = self._run_native if self.is_native else self._run
            out = run(hidden_states, router_logits)
            if self.shared_expert is not None:
                out = self.shared_expert(hidden_states, out)
        return out if self.tp_size == 1 else tensor_model_parallel_all_reduce(out)

    def _run(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """Shapes: router_logits [T, E], returns [T, D]."""
        return self.experts(hidden_states, self.topk(hidden_states, router_logits))

    def _run_native(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        """As `_run`, without SGLang's code for other routers and ranks.

        On a small model that code takes longer than routing.
        """
        config = self.topk.topk_config
        chosen = route(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=config.top_k,
            renormalize=config.renormalize,
        )
        topk = build_precomputed_topk_output(*chosen, config, self.topk.layer_id)
        given = StandardDispatchOutput(hidden_states, None, topk)
        return self.experts.run_moe_core(given).hidden_states
