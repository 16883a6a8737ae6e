"""Gated attention: projections, QK norm and RoPE, the engine's paged attention, and the gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.output_gate import output_gate
from qwen3next_plugin.kernels.qk_norm_rope import qk_norm_rope
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.projection import project
from qwen3next_plugin.model.rotary import rotary_table


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


class GatedAttention(nn.Module):
    """Full attention with a query-dependent output gate, QK norm and partial RoPE."""

    cos_sin: torch.Tensor  # shared by all axes of an image's positions
    mrope_axes: torch.Tensor  # of models that read images

    def __init__(
        self, config: Qwen3NextConfig, layers: HostLayers, prefix: str, *, attn: nn.Module
    ) -> None:
        super().__init__()
        self.shape = AttentionShape.from_config(config)
        self.eps = config.rms_norm_eps
        self.qkv_proj = layers.qkv_parallel(
            config.hidden_size,
            config.head_dim,
            2 * config.num_attention_heads,  # a query and a gate each
            config.num_key_value_heads,
            bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = layers.row_parallel(
            config.attention_dim,
            config.hidden_size,
            bias=config.attention_bias,
            prefix=f"{prefix}.o_proj",
        )
        self.register_buffer("cos_sin", rotary_table(config), persistent=False)
        if config.mrope_section:
            axes = mrope_axes(config.rotary_dim, config.mrope_section)
            self.register_buffer("mrope_axes", axes, persistent=False)
        self.attn = attn
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor | Unnormed, *batch: Any
    ) -> torch.Tensor:
        """Run the layer; `batch` is what the engine's attention needs besides q, k and v, if any.

        Shapes:
            positions [T] or [3, T], x [T, D], returns [T, D]
        """
        (qkv,) = project(x, self.qkv_proj)
        cos_sin = self.cos_sin
        if positions.ndim == 2:
            cos_sin = mrope_table(cos_sin, positions, self.mrope_axes)
            positions = torch.arange(positions.shape[1], device=positions.device)
        q, k, v, gate = prepare(
            qkv=qkv,
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            cos_sin=cos_sin,
            positions=positions,
            shape=self.shape,
            eps=self.eps,
        )
        output, _ = self.o_proj(apply_gate(self.attn(q, k, v, *batch), gate))
        return output


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
    """Which of a token's positions (time, height, width) rotates each dim.

    Pair i uses the height if i = 1 mod 3 and the width if i = 2 mod 3, up to the ends of their
    sections; otherwise the time.

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
