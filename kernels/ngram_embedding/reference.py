"""The embedding as its equation, one row and token at a time."""

from functools import reduce

import torch
from torch import Tensor

from qwen3next_plugin.kernels.ngram_embedding.arguments import check_arguments
from qwen3next_plugin.kernels.ngram_embedding.hashing import NgramHash
from qwen3next_plugin.kernels.ngram_embedding.table import NgramTable
from qwen3next_plugin.kernels.step import Step, checked_rows


def run(
    token_ids: Tensor,
    table: NgramTable,
    hashing: NgramHash,
    tokens_: Tensor,
    span: Tensor,
    step: Step,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shapes as in the public op."""
    check_arguments(token_ids, table, hashing, tokens_, span, step)
    (rows, d), heads, n = table.shape, len(hashing.sizes), len(hashing.multipliers)
    _check_parts(hashing, rows)
    T, ring = len(token_ids), tokens_.shape[1]
    out = torch.zeros(T, heads * d, dtype=out_dtype, device=token_ids.device)
    for row in checked_rows(step, span, T, ring - n):
        kept = tokens_[row.slot]  # the token at position p is at p % ring
        for p, t in enumerate(range(row.begin, row.end), start=row.context):
            kept[p % ring] = token_ids[t]
            last = [int(kept[(p - i) % ring]) if i <= p else hashing.eos for i in range(n)]
            out[t] = table.take(hashed(last, hashing)).flatten().to(out_dtype)
    return out


def hashed(last: list[int], hashing: NgramHash) -> Tensor:
    """The row of each head. last: the n-gram's tokens, the newest first. Shapes: returns [heads]"""
    for i in range(1, len(last)):
        if last[i] == hashing.eos:
            last = last[:i] + [hashing.eos] * (len(last) - i)
            break
    products = (torch.tensor(last) * hashing.multipliers).unbind()
    lengths = range(2, len(last) + 1)
    mixed = torch.stack([reduce(torch.bitwise_xor, products[:length]) for length in lengths])
    each = len(hashing.sizes) // len(lengths)  # heads of an n-gram
    return hashing.offsets + mixed.repeat_interleave(each).remainder(hashing.sizes)


def _check_parts(hashing: NgramHash, rows: int) -> None:
    for h, (size, offset) in enumerate(
        zip(hashing.sizes.tolist(), hashing.offsets.tolist(), strict=True)
    ):
        if size < 1 or offset < 0 or offset + size > rows:
            raise RuntimeError(
                f"head {h}: rows {offset} to {offset + size} are not a part of {rows} rows"
            )
