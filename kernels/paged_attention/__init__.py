"""Attention over a pool of tokens: decode, verify (chains and trees) and prefill in one batch."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    INT,
    check,
    check_contiguous,
    check_page,
    sizes,
)

INDEX = (torch.int32, torch.int64)
MAX_DIM = 256  # kMaxDim of block.h


def paged_attention(
    *,
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    tree_mask: Tensor | None = None,
) -> Tensor:
    """out = softmax(scale q K^T) V of each query, over the positions it sees, in fp32.

    Query j of a sequence is at position seq_len - query_len + j and sees all positions up to its
    own. With a tree mask it sees all positions before this step's tokens, and the step's tokens
    that its row of the mask selects. What it sees is reduced in order, in blocks of 256. So a
    query's bits do not depend on the rest of the batch, on how its sequence was cut into chunks,
    on the number of threads, or on whether its path is alone or part of a tree. The output is zero
    for a query that sees nothing and for a token of no sequence.

    Shapes (Hq a multiple of Hkv, D at most 256):
        q: [T, Hq, D], any row stride
        key_cache, value_cache: q's dtype; they hold the keys and values of this step's tokens too
            [slots, Hkv, D], any slot stride, or
            [pages, P, Hkv, D], any strides but the last: pages of P positions
        token_table: [R, M] int32, any row stride: the slot of each position of a sequence, or the
            page of each P positions
        table_row: [N] int32 or int64, the row of token_table of each sequence
        query_start_loc: [N + 1] int32
        seq_lens: [N] int32 or int64, tokens of each sequence, including this step's
        tree_mask: bool or uint8; for each sequence in order, query_len x query_len entries
        returns [T, Hq, D]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a range of tokens, a table row, a length, a slot or a number of mask entries
            out of range; names the row. Sequences without tokens in this step are not checked.

    Source: softmax in blocks, arXiv:2205.14135; its merge over splits, arXiv:2311.01282.
    """
    op = "paged_attention"
    run = dispatch.implementation(op, q.device)
    _, Hq, D = sizes(op, "q", q, 3)
    cache = sizes(op, "key_cache", key_cache, 4 if key_cache.ndim == 4 else 3)
    Hkv, N = cache[-2], table_row.numel()
    if not 0 < D <= MAX_DIM or not cache[1] * Hkv or Hq % Hkv:
        raise ValueError(f"{op}: cannot serve {Hq} query heads of {D} dims with {Hkv} kv heads")
    check_page(op, "q", q, (Hq, D), ACTIVATIONS, q.device)
    if key_cache.ndim == 4:
        shape = (*cache[:2], Hkv, D)
        check(op, "key_cache", key_cache, shape, (q.dtype,), q.device)
        check(op, "value_cache", value_cache, shape, (q.dtype,), q.device)
    else:
        check_page(op, "key_cache", key_cache, (Hkv, D), (q.dtype,), q.device)
        check_page(op, "value_cache", value_cache, (Hkv, D), (q.dtype,), q.device)
        if len(key_cache) != len(value_cache):
            raise ValueError(f"{op}: {len(key_cache)} slots of keys, {len(value_cache)} of values")
    R, M = sizes(op, "token_table", token_table, 2)
    check(op, "token_table", token_table, (R, M), INT, q.device)
    check(op, "table_row", table_row, (N,), INDEX, q.device)
    check(op, "query_start_loc", query_start_loc, (N + 1,), INT, q.device)
    check(op, "seq_lens", seq_lens, (N,), INDEX, q.device)
    if tree_mask is not None:
        flat = (tree_mask.numel(),)
        check(op, "tree_mask", tree_mask, flat, (torch.bool, torch.uint8), q.device)
        check_contiguous(op, "tree_mask", tree_mask)
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    return run(q, key_cache, value_cache, *sequences, scale, tree_mask)
