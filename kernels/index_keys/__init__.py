"""Keys by which sparse attention finds blocks, and the queries for them."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.index_keys.arguments import check_arguments


def index_keys(
    *,
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
    """Store each token's key, and the key of each block that a token completes.

    q         = RoPE(norm(q), positions)
    key_cache = k, as projected
    block_cache = RoPE(norm(mean of the block's keys), block_positions of its last token)

    The norms are zero-centred, and the first dims are rotated as in `qk_norm_rope`, in fp32; the
    mean is rounded to the keys' dtype. A block has block_size positions of its sequence, from a
    multiple of block_size on. After a rejected draft its positions are written again, and so are
    the blocks that they complete: a cache needs nothing else to be rolled back. A token's bits do
    not depend on chunks or the rest of the batch.

    Shapes (Hi query heads, one key head, d dims):
        qk: [T, (Hi + 1) · d], any stride of dim 0: queries, then the key
        q_weight, k_weight: [d], fp32 or qk's dtype
        cos_sin: [length, rotary_dim], the cosines then the sines, fp32 or qk's dtype
        positions, block_positions: [T] int64, lines of cos_sin: of the token, and of the first
            token of its block
        key_cache_: qk's dtype, in place, any strides but the last: [pages, d], one position in a
            page; or [pages, P, d], P a multiple of block_size
        block_cache_: the same, [pages, d]: a block is in the page of its last token; or
            [pages, P / block_size, d]
        token_table, table_row, query_start_loc, seq_lens: as in `paged_attention`
        returns q [T, Hi, d]; zero for a token of no row

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: what `paged_attention` refuses, or a position outside cos_sin; nothing is
            written.

    Source: `Qwen4ExpTextQSAIndexer` of transformers.
    """
    run = dispatch.implementation("index_keys", qk.device)
    sequences = (token_table, table_row, query_start_loc, seq_lens)
    arguments = (
        *(qk, q_weight, k_weight, cos_sin, positions, block_positions, key_cache_, block_cache_),
        *sequences,
        block_size,
    )
    check_arguments(*arguments)
    return run(*arguments, eps)
