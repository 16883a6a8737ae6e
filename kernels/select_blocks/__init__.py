"""The blocks of its sequence that each query of sparse attention sees."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check_page, check_sequences, sizes
from qwen3next_plugin.kernels.index_keys.arguments import check_block_cache
from qwen3next_plugin.kernels.paged_attention.selection import Selection


def select_blocks(
    *,
    q: Tensor,
    block_cache: Tensor,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_size: int,
    top_k: int,
) -> Selection:
    """The top_k complete blocks of each query by score, and the tail after all complete blocks.

    score_b = sum over the heads h of max(0, q_h · key_b), in fp32

    A block is complete if its last position is not after the query's. Of equal scores the lower
    block comes first. A query with at most top_k complete blocks sees everything: it has no blocks,
    and its tail begins at 0. A query's selection does not depend on chunks or the rest of the
    batch. It also holds for later positions, whose tail is then longer.

    Shapes (Hi query heads, d dims):
        q: [T, Hi, d], any stride of dim 0, as `index_keys` returns it
        block_cache: as in `index_keys`; holds the blocks that this step's tokens complete too
        token_table, table_row, query_start_loc, seq_lens: as in `paged_attention`
        returns blocks [T, top_k] int32, rising, -1 after the last; tail [T] int32, 0 for a token of
            no row

    Raises:
        ValueError: an argument's shape, stride, device or dtype; no top_k.
        RuntimeError: what `paged_attention` refuses.

    Source: `Qwen4ExpTextQSAIndexer` of transformers.
    """
    op = "select_blocks"
    run = dispatch.implementation(op, q.device)
    _, Hi, d = sizes(op, "q", q, 3)
    check_page(op, "q", q, (Hi, d), ACTIVATIONS, q.device)
    check_block_cache(op, block_cache, d, block_size, q)
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    check_sequences(op, *sequences, q.device)
    if top_k < 1:
        raise ValueError(f"{op}: top_k = {top_k}")
    blocks, tail = run(q, block_cache, *sequences, block_size, top_k)
    return Selection(blocks, tail, block_size)
