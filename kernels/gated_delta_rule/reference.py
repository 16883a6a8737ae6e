"""The recurrence as its equation, one row and token at a time, in fp32."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from qwen3next_plugin.kernels.gated_delta_rule.arguments import check_arguments
from qwen3next_plugin.kernels.step import checked_rows


def l2_normalise(x: Tensor) -> Tensor:
    """x over its norm, along the last dim, in fp32."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gated_delta_rule(
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
    """Shapes as in the public op."""
    (T, H, K), (_, HV, _), W = q.shape, v.shape, key_.shape[1]
    check_arguments(
        q, k, v, a, b, A_log, dt_bias, state_, key_, u_, decay_, span_,
        query_start_loc, slot, context_len,
    )  # fmt: skip
    rows = checked_rows(query_start_loc, slot, context_len, span_, T, W)
    g = -A_log.float().exp() * softplus(a.float().flatten(1) + dt_bias.float())  # [T, HV]
    decay, beta = g.exp(), b.float().flatten(1).sigmoid()
    q, k = l2_normalise(q) * K**-0.5, l2_normalise(k)
    out = torch.zeros_like(v)

    def per_value_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(HV // H, dim=0)  # [H, K] -> [HV, K]

    def fold(S: Tensor, decay_t: Tensor, u_t: Tensor, k_t: Tensor) -> Tensor:
        return S * decay_t[:, None, None] + u_t[:, :, None] * per_value_head(k_t)[:, None, :]

    for row in rows:
        page, n = row.slot, row.end - row.begin
        S = torch.zeros_like(state_[page]) if row.fresh else state_[page]
        S = S.float()  # [HV, V, K]
        for i in range(row.committed):
            S = fold(S, decay_[page, i], u_[page, i], key_[page, i])
        state_[page] = S
        for i, t in enumerate(range(row.begin, row.end)):
            Sk = torch.einsum("hvk,hk->hv", S, per_value_head(k[t]))
            u_t = beta[t, :, None] * (v[t].float() - decay[t, :, None] * Sk)
            S = fold(S, decay[t], u_t, k[t])
            out[t] = torch.einsum("hvk,hk->hv", S, per_value_head(q[t]))
            if n <= W:
                key_[page, i], u_[page, i], decay_[page, i] = k[t], u_t, decay[t]
        if n > W:
            state_[page] = S
        span_[page] = torch.tensor(
            [row.end - row.begin + row.context, 0] if n > W else [row.context, n]
        )
    return out
