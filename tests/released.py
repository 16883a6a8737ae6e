"""The config.json of Qwen3-Next-80B-A3B, as it was released; other releases' with other sizes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig, read_config

RELEASED_80B = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def read(tp_size=1, pp_size=1, **changes):
    raw = {key: value for key, value in (RELEASED_80B | changes).items() if value != "absent"}
    return Qwen3NextConfig.from_hf(raw, tp_size=tp_size, pp_size=pp_size)


def read_with(sizes: Mapping[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """In place of `read_config`: the folder's, its text model of other sizes."""

    def read(folder: Path) -> dict[str, Any]:
        raw = read_config(folder)
        raw["text_config"] |= sizes
        return raw

    return read
