"""A Gated DeltaNet layer between its projections: from qkvz and ba to the input of out_proj.

An engine multiplies by the projections, and calls `attend` with the layer's pages and the step.
"""

import torch

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
    gated_delta_net,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import NULL_SLOT, Step

LONG = 64  # tokens of a long row
MAX_INT = 2**31 - 1


def shape_of(config: Qwen3NextConfig, layout: Layout = "grouped") -> GatedDeltaNetShape:
    """One rank's share of a layer."""
    return GatedDeltaNetShape(
        num_key_heads=config.linear_num_key_heads_per_rank,
        num_value_heads=config.linear_num_value_heads_per_rank,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        layout=layout,
    )


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
        projections=Projections(qkvz, ba, shape),
        weights=weights,
        pool_=pool_,
        step=step,
        out_=out_,
    )
    return out_


def idle_step(
    num_tokens: int, device: torch.device, *, rows: int = 1, max_query_len: int = MAX_INT
) -> Step:
    """A step whose rows have no page: it writes zeros, and takes a real step's scratch.

    The first row has all tokens. max_query_len decides which kernels the step launches.
    """
    slot = torch.full((rows,), NULL_SLOT, dtype=torch.int32, device=device)
    starts = torch.full((rows + 1,), num_tokens, dtype=torch.int32, device=device)
    starts[0].zero_()
    return Step(
        query_start_loc=starts,
        slot=slot,
        context_len=torch.zeros_like(slot),
        num_tokens=num_tokens,
        max_query_len=max_query_len,
    )


def launch_idle(
    *, weights: GatedDeltaNetWeights, shape: GatedDeltaNetShape, pool_: StatePool
) -> None:
    """Launch every kernel of the layer without a page, so that each is compiled.

    One short step and one long step launch them all.
    """
    H, HV = shape.num_key_heads, shape.num_value_heads
    for T, max_query_len in ((1, 1), (LONG, MAX_INT)):
        attend(
            qkvz=pool_.conv.new_zeros(T, 2 * H * shape.key_dim + 2 * HV * shape.value_dim),
            ba=pool_.conv.new_zeros(T, 2 * HV),
            weights=weights,
            shape=shape,
            pool_=pool_,
            step=idle_step(T, pool_.conv.device, max_query_len=max_query_len),
        )
