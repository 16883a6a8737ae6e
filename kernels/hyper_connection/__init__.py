"""Hyper-connections: a residual of several streams, mixed before a block and injected after it."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.hyper_connection.arguments import (
    HyperConnectionWeights,
    check_streams,
    check_weights,
    takes_packed,
)

__all__ = ["HyperConnectionWeights", "hyper_connection", "takes_packed"]


def hyper_connection(
    *,
    streams_: Tensor,
    weights: HyperConnectionWeights,
    eps: float,
    block: Tensor | None = None,
    injection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the last block's output to the streams, and mix them into the next block's input.

    streams_s += injection_s block           without `injection`: by 1; without `block`: nothing
    x         = norm(streams)                each stream by itself, zero-centred
    gate      = sigmoid(up silu(down x / hc))
    mixed     = mean over the streams s of gate_s x_s
    injection = 2 sigmoid(inject x / hc)     for the output of the block that reads `mixed`

    All sums are in fp32; x, silu(…), `mixed` and the streams are rounded to their dtype. `linear`
    describes the arithmetic of packed weights. A token's bits do not depend on the rest of the
    batch.

    A layer calls it twice: before its mixer with the output of the MLP before, and before its MLP.
    The final mixer, which has no `inject`, adds the last output. The first call may add the
    embedding to streams of zeros.

    Shapes:
        streams_: [T, hc, D], any stride of dim 0, in place
        block: [T, D], any stride of dim 0; injection: [T, hc] fp32
        returns `mixed` [T, D], and the next injection: [T, hc] fp32, or [T, 0] without `inject`

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen4ExpTextGatedResidual` of transformers; Hyper-Connections, arXiv:2409.19606.
    """
    op = "hyper_connection"
    run = dispatch.implementation(op, streams_.device)
    check_streams(op, streams_, block, injection)
    check_weights(op, weights, streams_)
    return run(streams_, weights, eps, block, injection)
