"""The router in Triton: a token's logits in the registers of one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu.configs import config_for

INF = tl.constexpr(float("inf"))


def run(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    T, E = logits.shape
    weights = logits.new_empty(T, top_k, dtype=torch.float32)
    experts = logits.new_empty(T, top_k, dtype=torch.int32)
    if T:
        _router[T,](
            logits, logits.stride(0), weights, experts,
            K=top_k, BK=next_power_of_2(top_k), E=E, BE=next_power_of_2(E),
            RENORMALISES=renormalise,
            **config_for(logits.device).commit.options(),
        )  # fmt: skip
    return weights, experts


@triton.jit
def _router(
    logits, logits_token, weights, experts,
    RENORMALISES: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One token; grid (T)."""
    t = tl.program_id(0).to(tl.int64)
    e, rank = tl.arange(0, BE), tl.arange(0, BK)
    x = tl.load(logits + t * logits_token + e, mask=e < E, other=-INF).to(tl.float32)
    most = tl.max(x, 0)
    undefined = (tl.sum((x < INF).to(tl.int32), 0) < BE) | (most == -INF)

    left = e < E  # not yet chosen
    chosen, values = rank, tl.zeros([BK], tl.float32)
    for i in range(K):
        value = tl.max(tl.where(left, x, -INF), 0)
        expert = tl.min(tl.where(left & (x == value), e, BE), 0)
        left = left & (e != expert)
        chosen = tl.where(rank == i, expert, chosen)
        values = tl.where(rank == i, value, values)

    p = tl.where(rank < K, tl.exp(values - most), 0.0)
    total = tl.sum(p, 0) if RENORMALISES else tl.sum(tl.exp(x - most), 0)
    p = tl.where(undefined, float("nan"), p / total)
    chosen = tl.where(undefined, rank, chosen)
    tl.store(weights + t * K + rank, p, mask=rank < K)
    tl.store(experts + t * K + rank, chosen, mask=rank < K)
