"""Attention as its equation, query by query, in fp32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3next_plugin.kernels.paged_attention.selection import Selection, selected


def run(
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
    """Shapes as in the public op; computes in fp32, or in q's dtype if that is wider."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // key_cache.shape[-2]  # query heads of a kv head
    out = q.new_zeros(q.shape)
    P = key_cache.shape[1] if key_cache.ndim == 4 else 1  # positions of a page
    sequences = list(
        checked(
            len(q), len(key_cache), P, token_table, table_row, query_start_loc, seq_lens, tree_mask
        )
    )
    if key_cache.ndim == 4:
        key_cache, value_cache = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    for begin, positions, sees in sequences:
        if selection is not None:
            sees = selected(sees, selection, begin)
        for j, seen in enumerate(sees):
            if not seen.any():
                continue
            k = key_cache[positions[seen]].to(dtype).repeat_interleave(group, 1)  # [n, Hq, D]
            v = value_cache[positions[seen]].to(dtype).repeat_interleave(group, 1)
            scores = scale * torch.einsum("hd,nhd->hn", q[begin + j].to(dtype), k)
            out[begin + j] = torch.einsum("hn,nhd->hd", scores.softmax(-1), v).to(q.dtype)
    return out


def checked(
    T: int,
    num_pages: int,
    P: int,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor | None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each row with tokens: its first token, its positions in the cache [S], the mask [n, S].

    Raises: RuntimeError naming the row if an index is out of range.
    """
    (R, M), masked = token_table.shape, 0
    starts = query_start_loc.tolist()
    for i, (line, S) in enumerate(zip(table_row.tolist(), seq_lens.tolist(), strict=True)):
        begin, end = starts[i : i + 2]
        if not 0 <= begin <= end <= T:
            raise RuntimeError(
                f"row {i}: query_start_loc {begin} to {end} is not a range of {T} tokens"
            )
        if begin == end:
            continue
        n = end - begin
        if not 0 <= line < R:
            raise RuntimeError(f"row {i}: table_row {line} is not one of {R} rows")
        if not n <= S <= M * P:
            raise RuntimeError(
                f"row {i}: seq_lens {S} is not between its {n} tokens and {M * P} positions"
            )
        pages = token_table[line, : -(-S // P)].long()
        outside = ((pages < 0) | (pages >= num_pages)).nonzero()
        if len(outside):
            p = int(outside[0])
            raise RuntimeError(
                f"row {i}: position {p * P} is in page {int(pages[p])}, not one of {num_pages}"
                " pages"
            )
        positions = (pages[:, None] * P + torch.arange(P, device=pages.device)).flatten()[:S]
        sees = torch.ones(n, S, dtype=torch.bool, device=positions.device).tril(S - n)
        if tree_mask is not None:
            if masked + n * n > len(tree_mask):
                raise RuntimeError(
                    f"row {i}: its {n} x {n} entries end beyond the {len(tree_mask)} of tree_mask"
                )
            sees[:, S - n :] = tree_mask[masked : masked + n * n].view(n, n)
            masked += n * n
        yield begin, positions, sees
    if tree_mask is not None and masked != len(tree_mask):
        raise RuntimeError(f"tree_mask has {len(tree_mask)} entries, the rows {masked}")
