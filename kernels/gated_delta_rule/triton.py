"""A linear-attention layer in Triton: two launches for decode and verify, five for prefill."""

import torch
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gated_delta_rule.arguments import check_arguments
from qwen3next_plugin.kernels.gated_delta_rule.commit import commit
from qwen3next_plugin.kernels.gated_delta_rule.long_rows import chunk_matrices, chunk_scan, prepare
from qwen3next_plugin.kernels.gated_delta_rule.operands import (
    Inputs,
    Norm,
    Pages,
    inputs,
    no_convolution,
    no_norm,
    pages,
)
from qwen3next_plugin.kernels.gated_delta_rule.short_rows import short_rows
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import Config, config_for
from qwen3next_plugin.kernels.gpu.convolution import Convolution
from qwen3next_plugin.kernels.gpu.rows import Rows, most_chunks, rows
from qwen3next_plugin.kernels.step import GRID

MIN_DOT = 16  # the least that tl.dot multiplies


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state_: Tensor,
    key_: Tensor,
    u_: Tensor,
    g_: Tensor,
    span_: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> Tensor:
    """Shapes as in the public op. A bad row is told by `faults.check`, its output is NaN."""
    step = (query_start_loc, slot, context_len)
    check_arguments(q, k, v, a, b, A_log, dt_bias, state_, key_, u_, g_, span_, *step)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    run_layer(
        x=inputs(q, k, v.unflatten(1, (q.shape[1], -1)), a, b, A_log, dt_bias),
        conv=None,
        norm=None,
        pages=pages(state_, key_, u_, g_),
        rows=rows(*step, span_),
        max_query_len=len(q),
        out_=out,
    )
    return faults.checked(out)


def run_layer(
    *,
    x: Inputs,
    conv: Convolution | None,
    norm: Norm | None,
    pages: Pages,
    rows: Rows,
    max_query_len: int,
    out_: Tensor,
) -> None:
    """Run the layer on its pages; see `gated_delta_net` for what it computes.

    Without a convolution q, k and v are taken as they come; without a norm out_ is the recurrence's
    own output. No row has more than max_query_len tokens.

    Shapes: out_ [T, HV, V] or [T, HV * V], contiguous
    """
    (T, H, K), (_, _, R, V), W = x.q.shape, x.v.shape, pages.key.shape[1]
    N, HV, slots, device = len(rows.slot), H * R, len(rows.span), x.q.device
    config = config_for(device)
    raw = out_.view(T, HV, V) if norm is None else x.v.new_empty(T, HV, V)
    keys = x.q.new_empty(T, H, K, dtype=torch.float32)
    row_faults = rows.slot.new_empty(N)
    sizes = {"H": H, "R": R, "K": K, "V": V, "W": W}
    convolves = {"CONVOLVES": conv is not None}
    conv = conv or no_convolution(x)
    if N == 0:
        out_.zero_()
        return

    BK, BV = max(MIN_DOT, next_power_of_2(K)), min(config.short_columns, next_power_of_2(V))
    short_rows[-(-V // BV) * HV, N](
        x, conv, rows, row_faults, faults.record(device), pages, keys, raw, T, slots,
        **sizes, **convolves, BK=BK, BV=BV, **config.short.options(),
    )  # fmt: skip
    if max_query_len > W - GRID + 1:
        _run_long_rows(x, conv, pages, rows, keys, raw, config, sizes, convolves)
    commit[T + N, H](
        x, conv, norm or no_norm(x), rows, row_faults, pages, keys, raw, out_, T, N, slots,
        **sizes, **convolves, NORMS=norm is not None,
        BK=BK, BV=next_power_of_2(V), BR=next_power_of_2(R), **config.commit.options(),
    )  # fmt: skip


def _run_long_rows(
    x: Inputs,
    conv: Convolution,
    pages: Pages,
    rows: Rows,
    keys: Tensor,
    raw: Tensor,
    config: Config,
    sizes: dict[str, int],
    convolves: dict[str, bool],
) -> None:
    """Outputs, S and u of the rows that are longer than a draft can be."""
    (T, HV, V), H, R, K, W = raw.shape, *(sizes[name] for name in "HRKW")
    N, slots, C = len(rows.slot), len(rows.span), config.chunk
    BK, BV = max(MIN_DOT, next_power_of_2(K)), max(MIN_DOT, next_power_of_2(V))
    chunks = most_chunks(T, N, W - GRID, C)
    q, k, v = raw.new_empty(T, H, K), raw.new_empty(T, H, K), raw.new_empty(T, HV, V)
    g, beta = (raw.new_empty(T, HV, dtype=torch.float32) for _ in range(2))
    inverse, attention = raw.new_empty(T, HV, C), raw.new_empty(T, HV, C)
    prepare[chunks * C // config.prepare_tokens, H](
        x, conv, rows, q, k, v, g, beta, keys, T, N, slots,
        **sizes, **convolves, CHUNK=C, BT=config.prepare_tokens,
        BK=BK, BV=BV, BR=next_power_of_2(R), **config.prepare.options(),
    )  # fmt: skip
    # The precision says nothing where the operands are of 16 bits.
    precision = config.fp32_precision
    exact = raw.dtype == torch.float32
    chunk_matrices[chunks, HV](
        q, k, g, beta, rows, inverse, attention, T, N, slots,
        H=H, R=R, K=K, W=W, C=C, BK=BK, PRECISION=precision,
        INVERSE_PRECISION=precision if exact else config.inverse_precision,
        **config.matrices.options(),
    )  # fmt: skip
    BV = min(max(MIN_DOT, config.scan_columns), BV)
    chunk_scan[-(-V // BV) * HV, N](
        q, k, v, g, inverse, attention, rows, pages, raw, T, slots,
        **sizes, C=C, BK=BK, BV=BV, PRECISION=precision, **config.scan.options(),
    )  # fmt: skip
