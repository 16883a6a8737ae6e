"""Decode and verify: a row in one launch that reads S once and writes it once in GRID tokens.

Tokens go through the recurrence one by one, with the sums of the reference in the same order, so a
token's bits do not depend on how many came with it.
"""

import triton
import triton.language as tl

from qwen3next_plugin.kernels.gated_delta_rule.replay import replay, rounded, state_at
from qwen3next_plugin.kernels.gpu.convolution import WIDTH, convolved, kept_at, kept_input, taps
from qwen3next_plugin.kernels.gpu.rows import GRID, load_row, report_fault, state_position
from qwen3next_plugin.kernels.gpu.scalar_math import log_decay, sigmoid


@triton.jit
def normalised(x, scale):
    return x * (scale / tl.sqrt(tl.sum(x * x, 0) + 1e-6))


@triton.jit(do_not_specialize=["T", "slots"])
def short_rows(
    x, conv, step, row_faults, faults, pages, keys, out, T, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    CONVOLVES: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of V columns of one value head of one row; grid (V tiles * HV, N).

    Writes out [T, HV, V], S, u, the convolution's inputs, and the new keys to keys [T, H, K] fp32.
    `commit` writes what other programs of this launch still read. Writes the fault of every row,
    long ones included, to row_faults [N].
    """
    DRAFTS: tl.constexpr = W - GRID
    TILES: tl.constexpr = (V + BV - 1) // BV
    C: tl.constexpr = H * (2 * K + R * V)
    RING: tl.constexpr = WIDTH + DRAFTS
    DTYPE: tl.constexpr = out.dtype.element_ty
    tile, hv = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i = tl.program_id(1)
    page, begin, n, c, start, _, fault = load_row(step, i, T, slots, DRAFTS)
    if tl.program_id(0) == 0:
        tl.store(row_faults + i, report_fault(step, faults, i, T, slots, DRAFTS))
    if (page < 0) | (fault != 0) | (n > DRAFTS + 1):
        return
    h, r = hv // R, hv % R
    first_of_h = (tile == 0) & (r == 0)
    k_at, v_at = tl.arange(0, BK), tile * BV + tl.arange(0, BV)
    k_in, v_in = k_at < K, v_at < V
    if CONVOLVES:
        q_channel, k_channel = h * K + k_at, (H + h) * K + k_at
        v_channel = 2 * H * K + hv * V + v_at
        q_w, k_w = taps(conv, q_channel, k_in), taps(conv, k_channel, k_in)
        v_w = taps(conv, v_channel, v_in)
        q1 = kept_input(conv, page, c - 3, q_channel, k_in, C, RING)
        q2 = kept_input(conv, page, c - 2, q_channel, k_in, C, RING)
        q3 = kept_input(conv, page, c - 1, q_channel, k_in, C, RING)
        k1 = kept_input(conv, page, c - 3, k_channel, k_in, C, RING)
        k2 = kept_input(conv, page, c - 2, k_channel, k_in, C, RING)
        k3 = kept_input(conv, page, c - 1, k_channel, k_in, C, RING)
        v1 = kept_input(conv, page, c - 3, v_channel, v_in, C, RING)
        v2 = kept_input(conv, page, c - 2, v_channel, v_in, C, RING)
        v3 = kept_input(conv, page, c - 1, v_channel, v_in, C, RING)
    A_log = tl.load(x.A_log + hv).to(tl.float32)
    dt_bias = tl.load(x.dt_bias + hv).to(tl.float32)

    p0, base = state_position(c, start), c // GRID * GRID
    S_at, S_in = state_at(pages, page, hv, k_at, v_at, K, V)
    S = tl.load(S_at, mask=S_in & (p0 > 0), other=0.0).to(tl.float32)
    S = replay(S, pages, page, p0, base, hv, k_at, v_at, H, R, K, V, W, STAGES)
    if base > p0:
        tl.store(S_at, S.to(pages.state.dtype.element_ty), mask=S_in)
    S = replay(S, pages, page, base, c, hv, k_at, v_at, H, R, K, V, W, STAGES)
    tl.debug_barrier()  # the last draft's u takes the place of one that other warps may still load

    for j in range(0, n):
        p = c + j
        t = (begin + j).to(tl.int64)
        q = tl.load(x.q + t * x.q_token + h * x.q_head + k_at, mask=k_in, other=0.0)
        k = tl.load(x.k + t * x.k_token + h * x.k_head + k_at, mask=k_in, other=0.0)
        v_from = x.v + t * x.v_token + h * x.v_head + r * x.v_value + v_at
        v = tl.load(v_from, mask=v_in, other=0.0)
        a = tl.load(x.a + t * x.a_token + h * x.a_head + r).to(tl.float32)
        b = tl.load(x.b + t * x.b_token + h * x.b_head + r).to(tl.float32)
        if CONVOLVES:
            tl.store(kept_at(conv, page, p, q_channel, C, RING), q, mask=k_in & first_of_h)
            tl.store(kept_at(conv, page, p, k_channel, C, RING), k, mask=k_in & first_of_h)
            tl.store(kept_at(conv, page, p, v_channel, C, RING), v, mask=v_in)
            q4, k4, v4 = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
            q = convolved(q1, q2, q3, q4, q_w, DTYPE)
            k = convolved(k1, k2, k3, k4, k_w, DTYPE)
            v = convolved(v1, v2, v3, v4, v_w, DTYPE)
            q1, q2, q3 = q2, q3, q4
            k1, k2, k3 = k2, k3, k4
            v1, v2, v3 = v2, v3, v4
        q = normalised(q.to(tl.float32), K**-0.5)
        k = normalised(k.to(tl.float32), 1.0)
        tl.store(keys + (t * H + h) * K + k_at, k, mask=k_in & first_of_h)
        S = tl.exp(log_decay(a, A_log, dt_bias)) * S
        u = sigmoid(b) * (v.to(tl.float32) - tl.sum(S * k[:, None], 0))
        S = tl.fma(k[:, None], u[None, :], S)
        o = tl.sum(S * q[:, None], 0)
        tl.store(out + (t * H * R + hv) * V + v_at, o.to(DTYPE), mask=v_in)
        tl.store(pages.u + page * pages.u_slot + (p % W * H * R + hv) * V + v_at, u, mask=v_in)
        S = rounded(S, p, pages.state.dtype.element_ty)
