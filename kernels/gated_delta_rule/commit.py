"""The last launch of a layer: the gated norm, and page writes that no earlier launch may see."""

import triton
import triton.language as tl

from qwen3next_plugin.kernels.gpu.convolution import WIDTH, kept_at
from qwen3next_plugin.kernels.gpu.rows import GRID, load_range, row_of_token
from qwen3next_plugin.kernels.gpu.scalar_math import log_decay, sigmoid, silu


@triton.jit(do_not_specialize=["T", "N"])
def commit(
    x, conv, norm, step, row_faults, pages, keys, raw, out, T, N,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    CONVOLVES: tl.constexpr, NORMS: tl.constexpr, SIGMOID: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One key head of one token, or a row's span; grid (T + N, H).

    Computes out [T, HV, V] from raw [T, HV, V]: the gated norm if NORMS, else raw itself, in place.
    Zero for a token without a row or whose row has no page, NaN for one of a bad row.
    """
    DRAFTS: tl.constexpr = W - GRID
    C: tl.constexpr = H * (2 * K + R * V)
    RING: tl.constexpr = WIDTH + DRAFTS
    h = tl.program_id(1)
    is_row = tl.program_id(0) >= T
    if is_row:
        i = tl.program_id(0) - T
    else:
        i = tl.minimum(row_of_token(step, tl.program_id(0), N), N - 1)
    page, begin, end, c = load_range(step, i)  # not its span, which another program writes
    n, fault = end - begin, tl.load(row_faults + i)
    is_long = n > DRAFTS + 1
    certain = tl.where(is_long, c + n, c)
    if is_row:
        if (h == 0) & (page >= 0) & (fault == 0):
            tl.store(step.span + page * step.span_slot, certain)
            tl.store(step.span + page * step.span_slot + 1, c + n)
        return
    t = tl.program_id(0).to(tl.int64)
    covered = (t >= begin) & (t < begin + n)
    runs = covered & (page >= 0) & (fault == 0)
    v_at = tl.arange(0, BV)
    v_in = v_at < V
    if NORMS | (runs == 0):
        nothing = tl.where(covered & (fault != 0), float("nan"), 0.0)
        for r in tl.static_range(R):
            at = (t * H * R + h * R + r) * V + v_at
            y = tl.load(raw + at, mask=v_in & runs, other=0.0).to(tl.float32)
            if NORMS:
                z_at = norm.z + t * norm.z_token + h * norm.z_head + r * norm.z_value + v_at
                z = tl.load(z_at, mask=v_in, other=0.0).to(tl.float32)
                w = tl.load(norm.weight + v_at, mask=v_in, other=0.0).to(tl.float32)
                gate = sigmoid(z) if SIGMOID else silu(z)
                y = y * tl.rsqrt(tl.sum(y * y, 0) / V + norm.eps) * w * gate
            y = tl.where(runs, y, nothing)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=v_in)
    if not runs:
        return
    p = c + (t - begin).to(tl.int32)
    k_at = tl.arange(0, BK)
    k_in = k_at < K
    if p >= certain // GRID * GRID:
        key = tl.load(keys + (t * H + h) * K + k_at, mask=k_in, other=0.0)
        tl.store(pages.key + page * pages.key_slot + (p % W * H + h) * K + k_at, key, mask=k_in)
        r_at = tl.arange(0, BR)
        r_in = r_at < R
        a = tl.load(x.a + t * x.a_token + h * x.a_head + r_at, mask=r_in, other=0.0)
        A_log = tl.load(x.A_log + h * R + r_at, mask=r_in, other=0.0).to(tl.float32)
        dt_bias = tl.load(x.dt_bias + h * R + r_at, mask=r_in, other=0.0).to(tl.float32)
        g = log_decay(a.to(tl.float32), A_log, dt_bias)
        g_at = pages.g + page * pages.g_slot + p % W * H * R + h * R + r_at
        tl.store(g_at, g, mask=r_in)
    if CONVOLVES:  # noqa: SIM102 - known at compile time
        if is_long & (p >= c + n - (WIDTH - 1)):
            q_from, k_from = x.q + t * x.q_token + h * x.q_head, x.k + t * x.k_token + h * x.k_head
            q = tl.load(q_from + k_at, mask=k_in, other=0.0)
            k = tl.load(k_from + k_at, mask=k_in, other=0.0)
            tl.store(kept_at(conv, page, p, h * K + k_at, C, RING), q, mask=k_in)
            tl.store(kept_at(conv, page, p, (H + h) * K + k_at, C, RING), k, mask=k_in)
            for r in tl.static_range(R):
                v_from = x.v + t * x.v_token + h * x.v_head + r * x.v_value
                v = tl.load(v_from + v_at, mask=v_in, other=0.0)
                channel = 2 * H * K + (h * R + r) * V + v_at
                tl.store(kept_at(conv, page, p, channel, C, RING), v, mask=v_in)
