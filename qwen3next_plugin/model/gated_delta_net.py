"""A Gated DeltaNet layer between its projections: from qkvz and ba to the input of out_proj.

An engine multiplies by the projections, and calls `attend` with the layer's pages and the step.
"""

from dataclasses import dataclass
from typing import Self

import torch

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetWeights,
    Projections,
    gated_delta_net,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import NULL_SLOT, Step

LONG = 64  # tokens of a long row
MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class GatedDeltaNetShape:
    """Head counts and dims of one rank's share of the layer."""

    num_key_heads: int  # H
    num_value_heads: int  # HV
    key_dim: int  # K
    value_dim: int  # V
    layout: Layout = "grouped"  # of the columns of qkvz and ba

    @classmethod
    def from_config(cls, config: Qwen3NextConfig, layout: Layout = "grouped") -> Self:
        return cls(
            num_key_heads=config.linear_num_key_heads_per_rank,
            num_value_heads=config.linear_num_value_heads_per_rank,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            layout=layout,
        )

    @property
    def values_per_key(self) -> int:
        """R, the value heads that share a key head."""
        return self.num_value_heads // self.num_key_heads


def split_projections(
    qkvz: torch.Tensor, ba: torch.Tensor, shape: GatedDeltaNetShape
) -> Projections:
    """View the projections as q, k, v, z, b, a, without a copy.

    Grouped, each key head has [q | k | R values | R gates] and [R b | R a]. Flat, all heads' q come
    first, then all heads' k, and so on.

    Shapes:
        qkvz [T, H·(2K + 2R·V)], ba [T, H·2R]
        returns q, k [T, H, K]; v, z [T, H, R, V]; b, a [T, H, R]
    """
    H, K, V, R = shape.num_key_heads, shape.key_dim, shape.value_dim, shape.values_per_key
    T = qkvz.shape[0]
    if shape.layout == "flat":
        q, k, v, z = qkvz.split([H * K, H * K, H * R * V, H * R * V], dim=-1)
        b, a = ba.view(T, 2, H, R).unbind(1)
        heads, values = (T, H, K), (T, H, R, V)
        return Projections(q.view(heads), k.view(heads), v.view(values), z.view(values), b, a)
    q, k, v, z = qkvz.view(T, H, 2 * K + 2 * R * V).split([K, K, R * V, R * V], dim=-1)
    b, a = ba.view(T, H, 2 * R).split([R, R], dim=-1)
    return Projections(q, k, v.view(T, H, R, V), z.view(T, H, R, V), b, a)


def attend(
    *,
    qkvz: torch.Tensor,
    ba: torch.Tensor,
    weights: GatedDeltaNetWeights,
    shape: GatedDeltaNetShape,
    pool_: StatePool,
    step: Step,
    out_: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve, apply the gated delta rule to each row's page, norm and gate.

    "Gated Delta Networks", Yang, Kautz and Hatamizadeh, arXiv:2412.06464.

    Shapes:
        qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]: out_, if it is given

    Raises:
        RuntimeError: a row's page cannot continue at its context length.
    """
    if out_ is None:
        out_ = qkvz.new_empty(len(qkvz), shape.num_value_heads * shape.value_dim)
    gated_delta_net(
        projections=split_projections(qkvz, ba, shape),
        weights=weights,
        pool_=pool_,
        step=step,
        out_=out_,
    )
    return out_


def launch_idle(
    *, weights: GatedDeltaNetWeights, shape: GatedDeltaNetShape, pool_: StatePool
) -> None:
    """Launch every kernel of the layer on a row without a page, so that each is compiled.

    max_query_len decides which kernels a step launches: one short step and one long step cover all.
    """
    H, HV, device = shape.num_key_heads, shape.num_value_heads, pool_.span.device
    for T, max_query_len in ((1, 1), (LONG, MAX_INT)):
        null = torch.full((1,), NULL_SLOT, dtype=torch.int32, device=device)
        attend(
            qkvz=pool_.conv.new_zeros(T, 2 * H * shape.key_dim + 2 * HV * shape.value_dim),
            ba=pool_.conv.new_zeros(T, 2 * HV),
            weights=weights,
            shape=shape,
            pool_=pool_,
            step=Step(
                query_start_loc=torch.tensor([0, T], dtype=torch.int32, device=device),
                slot=null,
                context_len=torch.zeros_like(null),
                num_tokens=T,
                max_query_len=max_query_len,
            ),
        )
