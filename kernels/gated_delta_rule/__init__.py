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
    g_: Tensor,
    span_: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> Tensor:
    """S = exp(g_t) S; u_t = beta_t (v_t - S^T k_t); S = S + k_t u_t^T; o_t = S^T q_t.

    g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b); q and k are L2-normalised here
    (epsilon 1e-6 inside the root) and q is scaled by K^-1/2. S is kept, and in its own dtype
    rounded, at the positions that are multiples of GRID; a page holds the tokens after the one
    at which it stands, in rings. A row of n <= k + 1 tokens can be rolled back to any of them:
    S then waits until all tokens up to the next multiple are known to stay, and span = (c, c + n).
    All tokens of a longer row stay, and span = (c + n, c + n). Outputs depend on the tokens only,
    not on how they were grouped into rows.

    Shapes:
        q, k: [T, H, K], v: [T, HV, V], a, b: [T, H, HV / H]; any strides but the last; K <= 256
        A_log, dt_bias: [HV], fp32 or the activations' dtype
        state_: [slots, HV, K, V] fp32 or bf16, key_: [slots, W, H, K] fp32 (normalised),
            u_: [slots, W, HV, V] fp32, g_: [slots, W, HV] fp32, W = GRID + k, position p at
            p % W; span_: [slots, 2] int32 (start, end): the context lengths at which the page
            can continue, its S at the last multiple of GRID up to start; each slot contiguous,
            all updated in place
        query_start_loc: [N + 1], slot: [N] (-1: no page, zeros out), context_len: [N] (tokens
            before this step's, 0: a fresh state), all int32
        returns [T, HV, V]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464; transformers' Qwen3-Next.
    """
    run = dispatch.implementation("gated_delta_rule", q.device)
    pages = (state_, key_, u_, g_, span_)
    return run(q, k, v, a, b, A_log, dt_bias, *pages, query_start_loc, slot, context_len)
