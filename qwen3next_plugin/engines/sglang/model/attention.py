"""Gated attention around SGLang's KV cache."""

from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.model.attention import GatedAttention


def make_attention(
    config: Qwen3NextConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
    *,
    layer_id: int,
) -> GatedAttention:
    """The neutral layer, from SGLang's parts."""
    attn = RadixAttention(
        config.num_attention_heads_per_rank,
        config.head_dim,
        config.head_dim**-0.5,
        num_kv_heads=config.num_key_value_heads_per_rank,
        layer_id=layer_id,
        quant_config=quant_config,
        prefix=f"{prefix}.attn",
    )
    return GatedAttention(config, host_layers(quant_config), prefix, attn=attn)
