"""The caches and queries as their equations."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.paged_attention.reference import checked
from qwen3next_plugin.kernels.qk_norm_rope.reference import check_positions


def run(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    block_positions: Tensor,
    key_cache_: Tensor,
    block_cache_: Tensor,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_size: int,
    eps: float,
) -> Tensor:
    """Shapes as in the public op."""
    T, d = len(qk), len(q_weight)
    check_positions("position", positions, cos_sin)
    check_positions("block position", block_positions, cos_sin)
    P = key_cache_.shape[1] if key_cache_.dim() == 3 else 1
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    rows = list(checked(T, len(key_cache_), P, *sequences, None))
    heads = qk.unflatten(1, (-1, d))  # [T, Hi + 1, d]
    out = torch.zeros_like(heads[:, :-1], memory_format=torch.contiguous_format)
    for begin, places, sees in rows:
        n, S = sees.shape
        for t, p in zip(range(begin, begin + n), range(S - n, S), strict=True):
            out[t] = norm_rope(heads[t, :-1], q_weight, cos_sin[positions[t]], eps)
            key_cache_[_at(places[p], P)] = heads[t, -1]
            if (p + 1) % block_size == 0:
                of_block = places[p + 1 - block_size : p + 1]
                keys = torch.stack([key_cache_[_at(place, P)] for place in of_block])
                mean = keys.float().mean(0).to(qk.dtype)
                key = norm_rope(mean, k_weight, cos_sin[block_positions[t]], eps)
                block_cache_[block_place(places, p // block_size, block_size, P)] = key
    return out


def norm_rope(x: Tensor, weight: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    """Zero-centred norm, and RoPE of the first dims. Shapes: x [..., d], cos_sin [rotary_dim]"""
    cos, sin = cos_sin.float().chunk(2)
    half, d = len(cos), x.shape[-1]
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())
    y1, y2, rest = y.split([half, half, d - 2 * half], dim=-1)
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin, rest], dim=-1).to(x.dtype)


def block_place(places: Tensor, b: int, block_size: int, P: int) -> tuple[int, ...]:
    """Where a block cache has block b of a sequence whose positions are at these places."""
    if P == 1:
        return (int(places[(b + 1) * block_size - 1]),)
    page, first = divmod(int(places[b * block_size]), P)
    return page, first // block_size


def _at(place: Tensor, P: int) -> tuple[int, ...]:
    """The index of a position in the cache of keys."""
    return (int(place),) if P == 1 else divmod(int(place), P)
