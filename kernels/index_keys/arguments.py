"""The checks of the arguments of the two ops on index caches."""

from torch import Tensor

from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    INT64,
    check,
    check_sequences,
    sizes,
)


def check_block_cache(op: str, cache: Tensor, d: int, block_size: int, like: Tensor) -> None:
    """Raise ValueError unless it holds block keys of d dims, of the dtype and device of `like`."""
    dims = 3 if cache.dim() == 3 else 2
    shape = (*sizes(op, "block_cache", cache, dims)[:-1], d)
    check(op, "block_cache", cache, shape, (like.dtype,), like.device)
    if block_size < 1 or 0 in shape[1:]:
        raise ValueError(f"{op}: block_cache has shape {shape}, for blocks of {block_size}")


def check_arguments(
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
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are those of `index_keys`."""
    op, device = "index_keys", qk.device
    T, width = sizes(op, "qk", qk, 2)
    (d,), (length, rotary_dim) = (
        sizes(op, "q_weight", q_weight, 1),
        sizes(op, "cos_sin", cos_sin, 2),
    )
    if d == 0 or width % d or width < 2 * d:
        raise ValueError(f"{op}: {width} columns are no queries and a key of {d} dims")
    if rotary_dim % 2 or not 0 < rotary_dim <= d:
        raise ValueError(f"{op}: cannot rotate {rotary_dim} of {d} dims")
    parameters = (qk.dtype, *FLOAT)
    check(op, "qk", qk, (T, width), ACTIVATIONS, device)
    check(op, "q_weight", q_weight, (d,), parameters, device)
    check(op, "k_weight", k_weight, (d,), (q_weight.dtype,), device)
    check(op, "cos_sin", cos_sin, (length, rotary_dim), parameters, device)
    check(op, "positions", positions, (T,), INT64, device)
    check(op, "block_positions", block_positions, (T,), INT64, device)
    check_block_cache(op, block_cache_, d, block_size, qk)
    pages = key_cache_.shape[:1]
    shape: tuple[int, ...] = (*pages, d)
    if block_cache_.dim() == 3:
        shape = (*pages, block_cache_.shape[1] * block_size, d)
    check(op, "key_cache_", key_cache_, shape, (qk.dtype,), device)
    if len(block_cache_) != len(key_cache_):
        raise ValueError(f"{op}: {len(key_cache_)} pages of keys, {len(block_cache_)} of blocks")
    check_sequences(op, token_table, table_row, query_start_loc, seq_lens, device)
