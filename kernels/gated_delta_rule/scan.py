"""Prefill: take S through a row's chunks one after the other, or a long row's segments in parallel.

A chunk maps S to A S + B, and so does a segment of several chunks. A long row is therefore split at
positions that are multiples of SEGMENT, in three launches:
  `segment_transitions` scans all segments but the last in parallel, from S = 0 (which gives B) and
      from S = I without values (which gives A);
  `segment_starts` goes from segment to segment, one product each, to find S at each start;
  `chunk_scan` scans all segments in parallel, each from its S.
That is more than twice the products of a plain scan, so a row is split only if it is long and the
layer has too few tiles to fill the GPU. The choice depends only on the row's length and the layer's
sizes, not on the rest of the batch.
"""

import triton
import triton.language as tl

from qwen3next_plugin.kernels.gated_delta_rule.long_rows import chunk_tokens
from qwen3next_plugin.kernels.gated_delta_rule.replay import replay, state_at
from qwen3next_plugin.kernels.gpu.rows import GRID, load_row, row_of_chunk, state_position


@triton.jit
def segment_chunks(c, n, s, C: tl.constexpr, SEGMENT: tl.constexpr):
    """Segment s of a row: its first chunk, its end chunk (exclusive), and whether the row ends."""
    begin = (c // SEGMENT + s) * SEGMENT
    end = begin + tl.minimum(c + n - begin, SEGMENT)
    return tl.maximum(begin, c) // C - c // C, (end - 1) // C - c // C + 1, end == c + n


@triton.jit
def start_at(starts, index, hv, k_at, v_at, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Pointers to a tile of S at the start of a segment."""
    return starts + ((index.to(tl.int64) * HV + hv) * K + k_at[:, None]) * V + v_at[None, :]


@triton.jit
def fold_chunk(
    S, chunks, c, begin, n, last, j, hv, k_at, v_at,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S after the tokens of chunk j at positions before `last`.

    Also returns the positions, token indices, live mask, decays from the chunk's start, S before
    the chunk (in the activations' dtype), and u [C, columns].
    """
    DTYPE: tl.constexpr = chunks.k.dtype.element_ty
    at = tl.arange(0, C)
    p, t, live = chunk_tokens(c, begin, n, j, 0, C, C)
    here = live[:, None]
    key_at = chunks.k + (t * H + hv // R)[:, None] * K + k_at[None, :]
    value_at = chunks.v + (t * H * R + hv)[:, None] * V + v_at[None, :]
    keys = tl.load(key_at, mask=here & (k_at < K)[None, :], other=0.0)
    values = tl.load(value_at, mask=here & (v_at < V)[None, :], other=0.0).to(tl.float32)
    inverse_at = chunks.inverse + (t * H * R + hv)[:, None] * C + at[None, :]
    inverse = tl.load(inverse_at, mask=here, other=0.0)
    folds = live & (p < last)
    g_t = tl.load(chunks.g + t * H * R + hv, mask=live, other=0.0)
    g_next = tl.load(
        chunks.g + (t + 1) * H * R + hv, mask=folds & (p + 1 < last) & (at + 1 < C), other=0.0
    )
    from_start = tl.exp(tl.cumsum(g_t, 0))[:, None]
    to_end = tl.where(folds, tl.exp(tl.cumsum(g_next, 0, reverse=True)), 0.0)[:, None]
    through = tl.exp(tl.sum(tl.where(folds, g_t, 0.0), 0))

    S_low = S.to(DTYPE)
    y = values - from_start * tl.dot(keys, S_low, input_precision=PRECISION)
    u = tl.dot(inverse, y.to(DTYPE), input_precision=PRECISION)
    folded = (to_end * u).to(DTYPE)
    S = tl.dot(tl.trans(keys), folded, through * S, input_precision=PRECISION)
    return S, p, t, live, from_start, S_low, u


@triton.jit(do_not_specialize=["T", "N", "slots"])
def segment_transitions(
    chunks, step, transitions, T, N, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, SEGMENT: tl.constexpr, SPLIT_FROM: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BV columns of a segment's [B | A] for one value head; grid (tiles * HV, segments).

    Writes transitions [segments, HV, K, tiles * BV] fp32, in which A starts at a tile boundary.
    Skips a row's last segment.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV + (K + BV - 1) // BV
    A_FROM: tl.constexpr = (V + BV - 1) // BV * BV
    tile, hv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    index = tl.program_id(1)
    i, s = row_of_chunk(step, index, N, T, SPLIT_FROM, SEGMENT)
    if i >= N:
        return
    page, begin, n, c, _, _, fault = load_row(step, i, T, slots, W - GRID)
    first, to, ends = segment_chunks(c, n, s, C, SEGMENT)
    if (page < 0) | (fault != 0) | ends:
        return
    k_at, x_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    S = (k_at[:, None] == (x_at - A_FROM)[None, :]).to(tl.float32)
    for j in range(first, to):
        S = fold_chunk(S, chunks, c, begin, n, c + n, j, hv, k_at, x_at, H, R, K, V, C, PRECISION)[
            0
        ]
    tl.store(
        start_at(transitions, index, hv, k_at, x_at, H * R, K, TILES * BV),
        S, mask=(k_at < K)[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N", "slots"])
def segment_starts(
    transitions, starts, step, pages, T, N, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    SEGMENT: tl.constexpr, SPLIT_FROM: tl.constexpr, COLUMNS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S at the start of each segment, BV columns of one value head; grid (tiles * HV, segments).

    Writes starts [segments, HV, K, V] fp32. The program of a row's first segment writes all of its.
    COLUMNS is the width of the tiles in which `segment_transitions` wrote [B | A].
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    A_FROM: tl.constexpr = (V + COLUMNS - 1) // COLUMNS * COLUMNS
    WIDTH: tl.constexpr = A_FROM + (K + COLUMNS - 1) // COLUMNS * COLUMNS
    tile, hv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    index = tl.program_id(1)
    i, s = row_of_chunk(step, index, N, T, SPLIT_FROM, SEGMENT)
    if (i >= N) | (s != 0):
        return
    page, _, n, c, start, _, fault = load_row(step, i, T, slots, W - GRID)
    if (page < 0) | (fault != 0):
        return
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    p0 = state_position(c, start)
    S_at, S_in = state_at(pages, page, hv, k_at, v_at, K, V)
    S = tl.load(S_at, mask=S_in & (p0 > 0), other=0.0).to(tl.float32)
    S = replay(S, pages, page, p0, c, hv, k_at, v_at, H, R, K, V, W)
    tl.store(start_at(starts, index, hv, k_at, v_at, H * R, K, V), S, mask=S_in)
    segments = (c + n - 1) // SEGMENT - c // SEGMENT + 1
    # If query_start_loc is bad, the good rows may have more segments than there is room for.
    segments = tl.minimum(segments, tl.num_programs(1) - index)
    for j in range(0, segments - 1):
        A_at = start_at(transitions, index + j, hv, k_at, A_FROM + k_at, H * R, K, WIDTH)
        B_at = start_at(transitions, index + j, hv, k_at, v_at, H * R, K, WIDTH)
        A = tl.load(A_at, mask=(k_at < K)[:, None] & (k_at < K)[None, :], other=0.0)
        B = tl.load(B_at, mask=S_in, other=0.0)
        S = tl.dot(A, S, B, input_precision=PRECISION)
        tl.store(start_at(starts, index + j + 1, hv, k_at, v_at, H * R, K, V), S, mask=S_in)


@triton.jit(do_not_specialize=["T", "N", "slots"])
def chunk_scan(
    chunks, starts, step, pages, out, T, N, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, SPLITS: tl.constexpr, SEGMENT: tl.constexpr, SPLIT_FROM: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of an unsplit row or of one segment, BV columns of one value head.

    Grid (V tiles * HV, N + segments). Writes out [T, HV, V], S at the row's last grid point, and u
    of the tokens after it.
    """
    DRAFTS: tl.constexpr = W - GRID
    TILES: tl.constexpr = (V + BV - 1) // BV
    DTYPE: tl.constexpr = chunks.k.dtype.element_ty
    tile, hv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    index = tl.program_id(1) - N
    is_segment = (index >= 0) & SPLITS
    if is_segment:
        i, s = row_of_chunk(step, index, N, T, SPLIT_FROM, SEGMENT)
    else:
        i, s = tl.program_id(1), 0
    if i >= N:
        return
    page, begin, n, c, start, _, fault = load_row(step, i, T, slots, DRAFTS)
    # A launch without segments splits no row, however long.
    is_split = (n >= SPLIT_FROM) & SPLITS & (tl.num_programs(1) > N)
    if (page < 0) | (fault != 0) | (n <= DRAFTS + 1) | (is_split != is_segment):
        return
    k_at, v_at, at = tl.arange(0, BK), tile * BV + tl.arange(0, BV), tl.arange(0, C)
    k_in, v_in = (k_at < K)[None, :], (v_at < V)[None, :]
    end = c + n
    last = end // GRID * GRID  # the grid point at which S is written
    S_at, S_in = state_at(pages, page, hv, k_at, v_at, K, V)
    if is_segment:
        first, to, ends = segment_chunks(c, n, s, C, SEGMENT)
        S = tl.load(start_at(starts, index, hv, k_at, v_at, H * R, K, V), mask=S_in, other=0.0)
    else:
        first, to, ends = 0, (end - 1) // C - c // C + 1, end > 0
        p0 = state_position(c, start)
        S = tl.load(S_at, mask=S_in & (p0 > 0), other=0.0).to(tl.float32)
        S = replay(S, pages, page, p0, tl.minimum(c, last), hv, k_at, v_at, H, R, K, V, W)
        if last <= c:
            tl.store(S_at, S.to(pages.state.dtype.element_ty), mask=S_in)
            S = replay(S, pages, page, last, c, hv, k_at, v_at, H, R, K, V, W)
    for j in range(first, to):
        S, p, t, live, from_start, S_low, u = fold_chunk(
            S, chunks, c, begin, n, last, j, hv, k_at, v_at, H, R, K, V, C, PRECISION
        )
        here = live[:, None]
        query_at = chunks.q + (t * H + hv // R)[:, None] * K + k_at[None, :]
        queries = tl.load(query_at, mask=here & k_in, other=0.0)
        P_at = chunks.attention + (t * H * R + hv)[:, None] * C + at[None, :]
        P = tl.load(P_at, mask=here, other=0.0)
        o = from_start * tl.dot(queries, S_low, input_precision=PRECISION)
        o = tl.dot(P, u.to(DTYPE), o, input_precision=PRECISION)
        out_at = out + (t * H * R + hv)[:, None] * V + v_at[None, :]
        tl.store(out_at, o.to(out.dtype.element_ty), mask=here & v_in)
        u_at = pages.u + page * pages.u_slot + (p % W * H * R + hv)[:, None] * V + v_at[None, :]
        tl.store(u_at, u, mask=(live & (p >= last))[:, None] & v_in)
    if ends & (last > c):
        tl.store(S_at, S.to(pages.state.dtype.element_ty), mask=S_in)
