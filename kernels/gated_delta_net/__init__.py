"""A Gated DeltaNet layer between its projections, as one op, so that a GPU needs few launches."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gated_delta_net.arguments import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

__all__ = ["GatedDeltaNetShape", "GatedDeltaNetWeights", "Projections", "gated_delta_net"]


def gated_delta_net(
    *,
    projections: Projections,
    weights: GatedDeltaNetWeights,
    pool_: StatePool,
    step: Step,
    out_: Tensor,
) -> None:
    """`causal_conv1d`, `gated_delta_rule` and `rms_norm_gated`, one after the other.

    Shapes:
        pool_: all of it is updated
        out_: [T, HV * V] contiguous, qkvz's dtype. The caller allocates it, because a CUDA graph
            needs the same address on every replay.

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range. On a CPU nothing is
            written. On a GPU that row's page is not written, its output is NaN, and the next
            `kernels.gpu.faults.check` raises the error.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    run = dispatch.implementation("gated_delta_net", step.slot.device)
    run(projections, weights, pool_, step, out_)
