"""The native attention."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.paged_attention.selection import Selection

native.load()
_op = torch.ops.qwen3next.paged_attention.default


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
    """Shapes as in the public op."""
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    return _op(q, key_cache, value_cache, *sequences, scale, tree_mask, *(selection or NOTHING))


NOTHING = (None, None, 1)  # selected


@torch.library.register_fake("qwen3next::paged_attention")
def _(q: Tensor, *others: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape)
