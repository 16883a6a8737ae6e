"""The layer in Triton, in two launches for decode and verify; see gated_delta_rule/triton.py."""

from torch import Tensor

from qwen3next_plugin.kernels.gated_delta_net.arguments import (
    GatedDeltaNetWeights,
    Projections,
    checked_heads,
)
from qwen3next_plugin.kernels.gated_delta_rule.operands import gated_norm, inputs, pages
from qwen3next_plugin.kernels.gated_delta_rule.triton import run_layer
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.convolution import convolution
from qwen3next_plugin.kernels.gpu.rows import step_tensors
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


def run(
    x: Projections, weights: GatedDeltaNetWeights, pool: StatePool, step: Step, out_: Tensor
) -> None:
    """Shapes as in the public op."""
    q, k, v, z, b, a = checked_heads(x, weights, pool, step, out_)
    run_layer(
        x=inputs(q, k, v, a, b, weights.A_log, weights.dt_bias),
        conv=convolution(weights.conv, pool.conv),
        norm=gated_norm(z, weights.norm, weights.norm_eps),
        sigmoid_gate=weights.sigmoid_gate,
        pages=pages(pool),
        step=step_tensors(step, pool.span),
        max_query_len=step.max_query_len,
        out_=out_,
    )
    faults.checked(out_)
