"""The layer in Triton: two launches for decode and verify, five with prefill rows.

Seven where a row is split.
"""

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import check_arguments as check_convolution
from qwen3next_plugin.kernels.gated_delta_net import GatedDeltaNetWeights, Projections
from qwen3next_plugin.kernels.gated_delta_rule.arguments import check_arguments as check_rule
from qwen3next_plugin.kernels.gated_delta_rule.operands import Norm, inputs, pages
from qwen3next_plugin.kernels.gated_delta_rule.triton import run_layer
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.convolution import convolution
from qwen3next_plugin.kernels.gpu.rows import rows


def gated_delta_net(
    x: Projections,
    weights: GatedDeltaNetWeights,
    state_: Tensor,
    key_: Tensor,
    u_: Tensor,
    g_: Tensor,
    span_: Tensor,
    conv_: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
    max_query_len: int,
    out_: Tensor,
) -> None:
    """Shapes as in the public op."""
    step = (query_start_loc, slot, context_len)
    weight, A_log, dt_bias, norm, eps = weights
    check_convolution(x.q, x.k, x.v.flatten(2), weight, conv_, span_, *step)
    check_rule(
        x.q, x.k, x.v.flatten(1, 2), x.a, x.b, A_log, dt_bias, state_, key_, u_, g_, span_, *step
    )
    run_layer(
        x=inputs(x.q, x.k, x.v, x.a, x.b, A_log, dt_bias),
        conv=convolution(weight, conv_),
        norm=Norm(x.z, *x.z.stride()[:3], norm, eps),
        pages=pages(state_, key_, u_, g_),
        rows=rows(*step, span_),
        max_query_len=max_query_len,
        out_=out_,
    )
    faults.checked(out_)
