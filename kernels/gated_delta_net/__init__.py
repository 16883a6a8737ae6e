"""A Gated DeltaNet layer between its projections, as one op: as few launches as a GPU allows."""

from math import prod
from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import FLOAT, check, check_contiguous


class Projections(NamedTuple):
    """What the layer's two input projections give it.

    Shapes: q, k [T, H, K]; v, z [T, H, R, V]; b, a [T, H, R]; any strides but the last
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class GatedDeltaNetWeights(NamedTuple):
    """What the layer holds besides its projections.

    Shapes: conv [C, 4], C = H * (2 * K + R * V); A_log, dt_bias [HV]; norm [V]
    """

    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    norm_eps: float


def gated_delta_net(
    *,
    projections: Projections,
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
    """`causal_conv1d`, `gated_delta_rule` and `rms_norm_gated`, one after the other.

    Shapes:
        conv_ as of `causal_conv1d`; state_, key_, u_, g_, span_ as of `gated_delta_rule`
        query_start_loc [N + 1], slot [N], context_len [N], int32; no row is longer than
            max_query_len tokens, an int that needs no look at the device
        out_ [T, HV * V] contiguous, q's dtype: a place that a CUDA graph can come back to

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range. On a CPU nothing is
            written then; on a GPU that row's page is not, its output is NaN, and the error is
            raised by the next `kernels.gpu.faults.check`.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    op, x = "gated_delta_net", projections
    run = dispatch.implementation(op, slot.device)
    check(op, "z", x.z, tuple(x.v.shape), (x.q.dtype,), x.q.device)
    check(op, "norm", weights.norm, x.v.shape[-1:], (x.q.dtype, *FLOAT), x.q.device)
    check(op, "out_", out_, (len(x.q), prod(x.v.shape[1:])), (x.q.dtype,), x.q.device)
    check_contiguous(op, "out_", out_)
    pages = (state_, key_, u_, g_, span_, conv_)
    step = (query_start_loc, slot, context_len, max_query_len)
    run(projections, weights, *pages, *step, out_)
