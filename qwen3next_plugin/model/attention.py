"""Gated attention around a host's paged attention: QK norm and RoPE before it, the gate after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.output_gate import output_gate
from qwen3next_plugin.kernels.qk_norm_rope import qk_norm_rope


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts and dims of one rank's share of the layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int

    @classmethod
    def from_config(cls, config: Qwen3NextConfig) -> Self:
        return cls(
            num_heads=config.num_attention_heads_per_rank,
            num_kv_heads=config.num_key_value_heads_per_rank,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
        )


def prepare(
    *,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    shape: AttentionShape,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norm and rotate q and k in one pass; return v and the gate as views of the projection.

    Shapes:
        qkv [T, Hq·2·D + 2·Hkv·D], by query head [query | gate], then k, then v
        cos_sin [positions, rotary_dim], positions [T]
        returns q [T, Hq·D], k [T, Hkv·D], v [T, Hkv·D], gate [T, Hq, D]
    """
    D = shape.head_dim
    q_gate, _, v = qkv.split(
        [2 * shape.num_heads * D, shape.num_kv_heads * D, shape.num_kv_heads * D], dim=-1
    )
    gate = q_gate.unflatten(-1, (shape.num_heads, 2, D))[:, :, 1]  # [T, Hq, D]
    q, k = qk_norm_rope(
        qkv=qkv,
        q_weight=q_weight,
        k_weight=k_weight,
        cos_sin=cos_sin,
        positions=positions,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=D,
        rotary_dim=shape.rotary_dim,
        eps=eps,
    )
    return q, k, v, gate


def mrope_axes(rotary_dim: int, sections: Sequence[int]) -> torch.Tensor:
    """By which of a token's positions (in time, height, width) each rotated dim turns.

    Pair i turns by the height's if i = 1 mod 3 and by the width's if i = 2 mod 3, as far as the
    sections reach, and by the time's otherwise.

    Shapes:
        sections 3 numbers of pairs, returns [rotary_dim]
    """
    axes = torch.zeros(rotary_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes.repeat(2)


def mrope_table(cos_sin: torch.Tensor, positions: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """The rotation of each token by interleaved multimodal RoPE.

    Shapes:
        cos_sin [positions, rotary_dim], positions [3, T], axes [rotary_dim]
        returns [T, rotary_dim], for positions 0 to T-1

    Source: `Qwen3_5TextRotaryEmbedding` of transformers.
    """
    return cos_sin.gather(0, positions[axes].t())


def apply_gate(attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Multiply each head's output by the sigmoid of its gate, in place.

    Shapes:
        attended [T, Hq·D], gate [T, Hq, D], returns [T, Hq·D]
    """
    output_gate(x_=attended.view(gate.shape), gate=gate)
    return attended
