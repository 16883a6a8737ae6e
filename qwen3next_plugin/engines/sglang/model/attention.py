"""Gated attention as an SGLang layer: SGLang's projections and cache, our q, k and gate."""

import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.attention import (
    AttentionShape,
    apply_gate,
    mrope_axes,
    mrope_table,
    prepare,
)
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.rotary import rotary_table


class GatedAttention(nn.Module):
    """Full attention with a query-dependent output gate, QK norm and partial RoPE."""

    cos_sin: torch.Tensor  # which the axes of an image's positions share
    mrope_axes: torch.Tensor  # of models that read images

    def __init__(
        self,
        config: Qwen3NextConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.shape = AttentionShape.from_config(config)
        self.eps = config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            2 * config.num_attention_heads,  # a query and a gate each
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.attention_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.register_buffer("cos_sin", rotary_table(config), persistent=False)
        if config.mrope_section:
            axes = mrope_axes(config.rotary_dim, config.mrope_section)
            self.register_buffer("mrope_axes", axes, persistent=False)
        self.attn = RadixAttention(
            self.shape.num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=self.shape.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """Shapes: positions [T] or [3, T], hidden_states [T, D], returns [T, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        cos_sin = self.cos_sin
        if positions.ndim == 2:
            cos_sin = mrope_table(cos_sin, positions, self.mrope_axes)
            positions = torch.arange(len(cos_sin), device=cos_sin.device)
        q, k, v, gate = prepare(
            qkv=qkv,
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            cos_sin=cos_sin,
            positions=positions,
            shape=self.shape,
            eps=self.eps,
        )
        output, _ = self.o_proj(apply_gate(self.attn(q, k, v, forward_batch), gate))
        return output
