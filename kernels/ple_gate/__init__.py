"""The gate of per-layer embeddings: how much of a token's n-gram value each stream takes."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import check
from qwen3next_plugin.kernels.hyper_connection.arguments import check_streams
from qwen3next_plugin.kernels.ple_gate.arguments import PLENorms, check_norms

__all__ = ["PLENorms", "ple_gate"]


def ple_gate(
    *,
    streams_: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: PLENorms,
    eps: float,
    block: Tensor | None = None,
    injection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the last block's output to the streams, and gate a token's value for each of them.

    streams_s += injection_s block      as in `hyper_connection`
    score_s = norm_key(keys)_s · norm_query(streams)_s / sqrt(D)
    gated_s = sigmoid(sign(score_s) sqrt(max(|score_s|, 1e-6))) values
    normed  = norm_conv(gated)

    All three norms are zero-centred, each stream by itself. In fp32; the streams and `gated` are
    rounded to their dtype, the norm is that of the rounded. A token's bits do not depend on the
    rest of the batch. The layer then adds gated + dilated_conv1d(normed) to the streams.

    Shapes:
        streams_: [T, hc, D], any stride of dim 0, in place
        keys: [T, hc · D], values: [T, D], any stride of dim 0
        block: [T, D], any stride of dim 0; injection: [T, hc] fp32
        returns `gated` and `normed`, [T, hc · D]

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen4ExpTextPLELayer` of transformers.
    """
    op = "ple_gate"
    run = dispatch.implementation(op, streams_.device)
    check_streams(op, streams_, block, injection)
    T, hc, D = streams_.shape
    check(op, "keys", keys, (T, hc * D), (streams_.dtype,), streams_.device)
    check(op, "values", values, (T, D), (streams_.dtype,), streams_.device)
    check_norms(op, norms, streams_)
    return run(streams_, keys, values, norms, eps, block, injection)
