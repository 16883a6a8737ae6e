"""Attention over a paged KV cache: decode, verify (chains and trees) and prefill in one batch.

Full, or sparse: of a selection of blocks.
"""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    check,
    check_contiguous,
    check_page,
    check_sequences,
    sizes,
)
from qwen3next_plugin.kernels.paged_attention.selection import Selection, check_selection

__all__ = ["Selection", "paged_attention"]

MAX_DIM = 256  # kMaxDim of values.h
SCRATCH = 4 << 20  # bytes for each thread, at most: kKept of cpu.cpp, and a tile


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
    selection: Selection | None = None,
) -> Tensor:
    """out = softmax(scale q K^T) V of each query, over the positions it sees, in fp32.

    Query j of a row is at position seq_len - query_len + j and sees all positions up to its own.
    With a tree mask it sees all positions before this step's tokens, and those of the step's tokens
    that its line of the mask selects; with a selection, those of it. What it sees is reduced in
    order, 256 positions at a time. So a query's bits do not depend on the rest of the batch, on
    chunks, on the number of threads, or on whether its path is alone or part of a tree. The output
    is zero for a query that sees nothing and for a token of no row.

    Shapes (Hq a multiple of Hkv, D at most 256):
        q: [T, Hq, D], any stride of dim 0
        key_cache, value_cache: q's dtype; they hold the keys and values of this step's tokens too
            [pages, Hkv, D], any stride of dim 0: a page has one position; or
            [pages, P, Hkv, D], any strides but the last: a page has P positions
        token_table: [R, M] int32, any stride of dim 0: line by line, the pages of a sequence
        table_row: [N] int32 or int64, the line of token_table of each row
        query_start_loc: [N + 1] int32
        seq_lens: [N] int32 or int64, tokens of each row's sequence, including this step's
        tree_mask: bool or uint8; for each row in order, query_len x query_len entries
        selection: of the T queries, as of `select_blocks`; not beside a tree mask
        returns [T, Hq, D]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a range of tokens, a line of the table, a length, a page or a number of mask
            entries out of range, with the row; or a block or a tail, with the token. Rows without
            tokens are not checked.

    Source: softmax in blocks, arXiv:2205.14135; its merge over splits, arXiv:2311.01282.
    """
    op = "paged_attention"
    run = dispatch.implementation(op, q.device)
    _, Hq, D = sizes(op, "q", q, 3)
    cache = sizes(op, "key_cache", key_cache, 4 if key_cache.ndim == 4 else 3)
    Hkv = cache[-2]
    if not 0 < D <= MAX_DIM or not cache[1] * Hkv * Hq or Hq % Hkv:
        raise ValueError(f"{op}: cannot serve {Hq} query heads of {D} dims with {Hkv} kv heads")
    if not scale > 0:
        raise ValueError(f"{op}: scale is {scale}, not above 0")
    check_page(op, "q", q, (Hq, D), ACTIVATIONS, q.device)
    if key_cache.ndim == 4:
        shape = (*cache[:2], Hkv, D)
        check(op, "key_cache", key_cache, shape, (q.dtype,), q.device)
        check(op, "value_cache", value_cache, shape, (q.dtype,), q.device)
    else:
        check_page(op, "key_cache", key_cache, (Hkv, D), (q.dtype,), q.device)
        check_page(op, "value_cache", value_cache, (Hkv, D), (q.dtype,), q.device)
        if len(key_cache) != len(value_cache):
            raise ValueError(f"{op}: {len(key_cache)} pages of keys, {len(value_cache)} of values")
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    check_sequences(op, *sequences, q.device)
    if tree_mask is not None:
        flat = (tree_mask.numel(),)
        check(op, "tree_mask", tree_mask, flat, (torch.bool, torch.uint8), q.device)
        check_contiguous(op, "tree_mask", tree_mask)
    if selection is not None:
        if tree_mask is not None:
            raise ValueError(f"{op}: a tree mask beside a selection")
        check_selection(op, selection, len(q), q.device)
    return run(q, key_cache, value_cache, *sequences, scale, tree_mask, selection)
