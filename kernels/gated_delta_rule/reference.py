"""The gated delta rule as its equation, one row and token at a time, in fp32.

A page holds S at a multiple of 8 and the tokens since then (pages.py), so a row replays them first.
The other backends compute the same, faster; tests compare them with this one.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from qwen3next_plugin.kernels.gated_delta_rule.arguments import (
    RuleInputs,
    RuleWeights,
    check_arguments,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID, Step, checked_rows


def l2_normalise(x: Tensor) -> Tensor:
    """x over its norm, along the last dim, in fp32."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def run(x: RuleInputs, weights: RuleWeights, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op."""
    check_arguments(x, weights, pool, step)
    (q, k, v, a, b), (A_log, dt_bias), (state_, key_, u_, g_, span_, _) = x, weights, pool
    (T, H, K), (_, HV, _), W = q.shape, v.shape, key_.shape[1]
    rows = checked_rows(step, span_, T, W - GRID)
    g = -A_log.float().exp() * softplus(a.float().flatten(1) + dt_bias.float())  # [T, HV]
    beta = b.float().flatten(1).sigmoid()
    q, k = l2_normalise(q) * K**-0.5, l2_normalise(k)
    out = torch.zeros_like(v)

    def per_value_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(HV // H, dim=0)  # [H, K] -> [HV, K]

    def times(S: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("hkv,hk->hv", S, per_value_head(x))

    for row in rows:
        page, c = row.slot, row.context
        S = state_[page].float() if row.p0 else torch.zeros_like(state_[page]).float()  # [HV, K, V]
        certain, end = row.span
        for p in range(row.p0, end):
            at, t = p % W, row.begin + p - c
            if p >= c:
                key_[page, at], g_[page, at] = k[t], g[t]
            S = g_[page, at].exp()[:, None, None] * S
            if p >= c:
                u_[page, at] = beta[t, :, None] * (v[t].float() - times(S, k[t]))
            S = S + per_value_head(key_[page, at])[:, :, None] * u_[page, at][:, None, :]
            if p >= c:
                out[t] = times(S, q[t])
            if (p + 1) % GRID == 0:
                S = S.to(state_.dtype).float()
                if p < certain:
                    state_[page] = S
        span_[page] = torch.tensor(row.span)
    return out
