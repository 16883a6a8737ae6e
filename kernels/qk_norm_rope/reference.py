"""QK norm and RoPE as their equations."""

import torch
from torch import Tensor


def run(
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
    """Shapes as in the public op."""
    T, D = len(qkv), head_dim
    check_positions("position", positions, cos_sin)
    cos, sin = cos_sin[positions].float()[:, None].chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:  # [T, heads, D]
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())
        x1, x2, rest = x.split([rotary_dim // 2, rotary_dim // 2, D - rotary_dim], dim=-1)
        x = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)
        return x.to(qkv.dtype).flatten(1)

    query_gate, k, _ = qkv.split([2 * num_heads * D, num_kv_heads * D, num_kv_heads * D], dim=-1)
    q = query_gate.view(T, num_heads, 2 * D)[..., :D]
    return norm_rope(q, q_weight), norm_rope(k.view(T, num_kv_heads, D), k_weight)


def check_positions(name: str, positions: Tensor, cos_sin: Tensor) -> None:
    """Raise RuntimeError unless each is a line of cos_sin. name: of one of them."""
    for t, position in enumerate(positions.tolist()):
        if not 0 <= position < len(cos_sin):
            raise RuntimeError(
                f"token {t}: {name} {position} is not one of {len(cos_sin)} in cos_sin"
            )
