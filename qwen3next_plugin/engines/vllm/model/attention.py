"""Gated attention around vLLM's paged attention."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.cpu.attention import attention_backend
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.model.attention import GatedAttention


def make_attention(config: Qwen3NextConfig, vllm_config: VllmConfig, prefix: str) -> GatedAttention:
    """The neutral layer, from vLLM's parts."""
    attn = Attention(
        config.num_attention_heads_per_rank,
        config.head_dim,
        config.head_dim**-0.5,
        num_kv_heads=config.num_key_value_heads_per_rank,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=f"{prefix}.attn",
        attn_backend=attention_backend(),
    )
    return GatedAttention(config, host_layers(vllm_config), prefix, attn=attn)
