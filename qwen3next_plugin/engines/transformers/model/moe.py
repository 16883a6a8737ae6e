"""The mixture of experts, from the host's weights."""

from typing import Any

from torch import Tensor, nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.transformers.model.host_layers import Projection, host_layers
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear.packed_weight import PANEL
from qwen3next_plugin.kernels.rms_norm import Unnormed, normed
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.model.moe import SharedExpertGate, SwiGLU, packed_moe
from qwen3next_plugin.model.quantisation.packing import pack_plain


class SparseMoE(nn.Module):
    """Top-k routed experts (softmax, top-k, renormalise) plus one gated shared expert."""

    def __init__(self, config: Qwen3NextConfig, of_host: Any) -> None:
        super().__init__()
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Projection(of_host.gate.weight)
        experts = (of_host.experts.gate_up_proj, of_host.experts.down_proj)
        self.packs = config.moe_intermediate_size % PANEL == 0
        self.w13, self.w2 = (pack_plain(w).weight if self.packs else w for w in experts)
        self.shared_expert: SwiGLU | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert_gate = SharedExpertGate(config.hidden_size)
            self.shared_expert = SwiGLU(
                config.hidden_size,
                config.shared_expert_intermediate_size,
                host_layers(of_host.shared_expert),
                "shared_expert",
                expert_gate=self.shared_expert_gate,
            )

    def forward(self, x: Tensor | Unnormed) -> Tensor:
        """Shapes: x [T, D], returns [T, D]"""
        if self.packs:
            return packed_moe(
                x,
                gate=self.gate,
                w13=self.w13,
                w2=self.w2,
                shared_expert=self.shared_expert,
                top_k=self.top_k,
                renormalise=self.renormalise,
            )
        x = normed(x)
        logits, _ = self.gate(x)
        topk_weights, topk_ids = router(
            logits=logits, top_k=self.top_k, renormalise=self.renormalise
        )
        out = fused_moe(x=x, w13=self.w13, w2=self.w2, topk_weights=topk_weights, topk_ids=topk_ids)
        return self.shared_expert(x, out) if self.shared_expert else out
