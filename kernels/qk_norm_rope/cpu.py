"""The native QK norm and RoPE."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.qk_norm_rope.default


@torch.library.register_fake("qwen3next::qk_norm_rope")
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    T = qkv.shape[0]
    return qkv.new_empty(T, num_heads * head_dim), qkv.new_empty(T, num_kv_heads * head_dim)
