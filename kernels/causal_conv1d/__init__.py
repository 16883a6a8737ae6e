"""Causal depthwise convolution of width 4 with SiLU, over the pages of a batch."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch


def causal_conv1d(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    conv_: Tensor,
    span: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = silu(sum_j weight[:, j] x_{t-3+j}) over x = [q; k; v]; keeps each page's inputs.

    Runs before `gated_delta_rule`, which reads the same `span` and advances it.

    Shapes:
        q, k: [T, H, K], v: [T, H, R], R = HV / H * V; any strides but the last
        weight: [C, 4], C = H * (2 * K + R), fp32 or the activations' dtype
        conv_: [slots, 4 + k, C], each slot contiguous; a ring: the input at position p lies at
            row p % (4 + k)
        span: [slots, 2] int32 (start, end): context lengths the page can continue at
        query_start_loc: [N + 1], slot: [N] (-1: no page, zeros out), context_len: [N] (tokens
            before this step's), all int32
        returns q, k [T, H, K] and v [T, H, R], views of one contiguous [T, C]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: `causal_conv1d_fn` and `causal_conv1d_update` of transformers' Qwen3-Next.
    """
    run = dispatch.implementation("causal_conv1d", q.device)
    out = run(q, k, v, weight, conv_, span, query_start_loc, slot, context_len)  # [T, C]
    (T, H, K), R = q.shape, v.shape[-1]
    q, k, v = out.split([H * K, H * K, H * R], dim=-1)
    return q.view(T, H, K), k.view(T, H, K), v.view(T, H, R)
