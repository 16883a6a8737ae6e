"""The native embedding."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.ngram_embedding.hashing import NgramHash
from qwen3next_plugin.kernels.ngram_embedding.table import NgramTable
from qwen3next_plugin.kernels.step import Step

native.load()
_op = torch.ops.qwen3next.ngram_embedding.default


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
    where = (table.addresses, table.shape[0], table.shard_rows, table.shape[1])
    stored = (table.dtype, table.scale, table.mapped)
    page = (tokens_, span, step.query_start_loc, step.slot, step.context_len)
    return _op(token_ids, *where, *stored, *hashing, *page, out_dtype)


@torch.library.register_fake("qwen3next::ngram_embedding")
def _(token_ids: Tensor, *others: Any) -> Tensor:
    d, sizes, out_dtype = others[3], others[8], others[-1]
    return token_ids.new_empty(len(token_ids), len(sizes) * d, dtype=out_dtype)
