"""The selection as its equation, query by query."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.index_keys.reference import block_place
from qwen3next_plugin.kernels.paged_attention.reference import checked


def run(
    q: Tensor,
    block_cache: Tensor,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_size: int,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    T = len(q)
    blocks = torch.full((T, top_k), -1, dtype=torch.int32, device=q.device)
    tail = torch.zeros(T, dtype=torch.int32, device=q.device)
    P = block_cache.shape[1] * block_size if block_cache.dim() == 3 else 1
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    for begin, places, sees in checked(T, len(block_cache), P, *sequences, None):
        n, S = sees.shape
        keys = [block_cache[block_place(places, b, block_size, P)] for b in range(S // block_size)]
        for t, p in zip(range(begin, begin + n), range(S - n, S), strict=True):
            complete = (p + 1) // block_size
            if complete <= top_k:
                continue
            products = q[t].float() @ torch.stack(keys[:complete]).float().T  # [Hi, complete]
            order = products.relu().sum(0).sort(descending=True, stable=True).indices
            blocks[t] = order[:top_k].sort().values
            tail[t] = complete * block_size
    return blocks, tail
