"""The gated delta rule over the state pages of a batch: decode, verify and prefill rows alike."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch


def gated_delta_rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state_: Tensor,
    key_: Tensor,
    u_: Tensor,
    decay_: Tensor,
    span_: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> Tensor:
    """S = exp(g_t) S; u_t = beta_t (v_t - S k_t); S = S + u_t k_t^T; o_t = S q_t.

    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b); q and k are L2-normalised here
    (epsilon 1e-6 inside the root) and q is scaled by K^-1/2. A page holds S at position p0 and a
    window of the w tokens after it. Every row first folds the window tokens before its context
    length c into S; those from c on were rejected and are dropped. A row of n <= W tokens then
    becomes the window (span = c, n), a longer one is folded whole (span = c + n, 0).

    Shapes:
        q, k: [T, H, K], v: [T, HV, V], a, b: [T, H, HV / H]; any strides but the last; K <= 256
        A_log, dt_bias: [HV], fp32 or the activations' dtype
        state_: [slots, HV, V, K] fp32 or bf16, key_: [slots, W, H, K] fp32 (normalised),
            u_: [slots, W, HV, V] fp32, decay_: [slots, W, HV] fp32 (exp(g)),
            span_: [slots, 2] int32 (p0, w); each slot contiguous, all updated in place
        query_start_loc: [N + 1], slot: [N] (-1: no page, zeros out), context_len: [N] (tokens
            before this step's, 0: a fresh state), all int32
        returns [T, HV, V]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    run = dispatch.implementation("gated_delta_rule", q.device)
    pages = (state_, key_, u_, decay_, span_)
    return run(q, k, v, a, b, A_log, dt_bias, *pages, query_start_loc, slot, context_len)
