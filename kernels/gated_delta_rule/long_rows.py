"""Prefill: rows whose tokens are all final, in chunks of C positions, on the tensor cores.

S is the state at a chunk's start, G_i the sum of the log decays of tokens up to i, G_ij that of
tokens after j up to i. The corrected values of a chunk solve (I + L) u = y:
  L_ij = beta_i exp(G_ij) k_i . k_j (j < i)      y_i = beta_i (v_i - exp(G_i) S^T k_i)
  o_i  = exp(G_i) S^T q_i + sum_{j<=i} P_ij u_j   P_ij = exp(G_ij) q_i . k_j
  S    = exp(G_last) S + sum_j k_j (exp(G_last,j) u_j)^T
L and P do not depend on S: `chunk_matrices` computes them for all chunks at once, and the kernels
in scan.py then take S through the chunks. Chunks end at multiples of C: a prompt that was cut there
gives the same bits as a whole one, unless one of them is split.

Source: the WY form of Yang et al., arXiv 2406.06484 and 2412.06464.
"""

import triton
import triton.language as tl

from qwen3next_plugin.kernels.gpu.convolution import WIDTH, convolved_tile
from qwen3next_plugin.kernels.gpu.rows import GRID, load_row, row_of_chunk
from qwen3next_plugin.kernels.gpu.scalar_math import log_decay, sigmoid

B = tl.constexpr(16)  # size of a diagonal block of L


@triton.jit
def normalised_rows(x, scale):
    return x * (scale / tl.sqrt(tl.sum(x * x, 1) + 1e-6))[:, None]


@triton.jit
def chunk_tokens(c, begin, n, j, first, C: tl.constexpr, SIZE: tl.constexpr):
    """SIZE positions of chunk j of a row, their token indices, and the mask of those in the row."""
    p = (c // C + j) * C + first + tl.arange(0, SIZE)
    return p, (begin + p - c).to(tl.int64), (p >= c) & (p < c + n)


@triton.jit(do_not_specialize=["T", "N", "slots"])
def prepare(
    x, conv, step, q_out, k_out, v_out, g_out, beta_out, keys, T, N, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    CONVOLVES: tl.constexpr, CHUNK: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Inputs of the chunks: BT tokens of one key head; grid (chunks * CHUNK / BT, H).

    Writes q, k [T, H, K] (normalised) and v [T, HV, V] in the activations' dtype, g, beta [T, HV]
    in fp32, and to keys [T, H, K] fp32 the keys that the page will keep.
    """
    DRAFTS: tl.constexpr = W - GRID
    C: tl.constexpr = H * (2 * K + R * V)
    RING: tl.constexpr = WIDTH + DRAFTS
    PARTS: tl.constexpr = CHUNK // BT
    h = tl.program_id(1)
    i, j = row_of_chunk(step, tl.program_id(0) // PARTS, N, T, DRAFTS + 2, CHUNK)
    if i >= N:
        return
    page, begin, n, c, _, _, fault = load_row(step, i, T, slots, DRAFTS)
    if (page < 0) | (fault != 0):
        return
    first = tl.program_id(0) % PARTS * BT
    p, t, live = chunk_tokens(c, begin, n, j, first, CHUNK, BT)
    k_at, v_at, r_at = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BR)
    k_in, v_in, r_in = k_at < K, v_at < V, r_at < R
    to = (t * H + h)[:, None] * K + k_at[None, :]
    inside = live[:, None] & k_in[None, :]
    q = convolved_tile(
        x.q + h * x.q_head, x.q_token, conv, page, p, t, c, live, h * K + k_at, k_at, k_in,
        CONVOLVES, C, RING,
    )  # fmt: skip
    tl.store(q_out + to, normalised_rows(q, K**-0.5).to(q_out.dtype.element_ty), mask=inside)
    k = convolved_tile(
        x.k + h * x.k_head, x.k_token, conv, page, p, t, c, live, (H + h) * K + k_at, k_at, k_in,
        CONVOLVES, C, RING,
    )  # fmt: skip
    k = normalised_rows(k, 1.0)
    tl.store(k_out + to, k.to(k_out.dtype.element_ty), mask=inside)
    stays = p >= (c + n) // GRID * GRID
    tl.store(keys + to, k, mask=inside & stays[:, None])
    for r in tl.static_range(R):
        hv = h * R + r
        v = convolved_tile(
            x.v + h * x.v_head + r * x.v_value, x.v_token, conv, page, p, t, c, live,
            2 * H * K + hv * V + v_at, v_at, v_in, CONVOLVES, C, RING,
        )  # fmt: skip
        at = (t * H * R + hv)[:, None] * V + v_at[None, :]
        tl.store(v_out + at, v.to(v_out.dtype.element_ty), mask=live[:, None] & v_in[None, :])
    each = live[:, None] & r_in[None, :]
    a_at = x.a + t[:, None] * x.a_token + h * x.a_head + r_at[None, :]
    b_at = x.b + t[:, None] * x.b_token + h * x.b_head + r_at[None, :]
    a = tl.load(a_at, mask=each, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=each, other=0.0).to(tl.float32)
    A_log = tl.load(x.A_log + h * R + r_at, mask=r_in, other=0.0).to(tl.float32)
    dt_bias = tl.load(x.dt_bias + h * R + r_at, mask=r_in, other=0.0).to(tl.float32)
    at = t[:, None] * H * R + h * R + r_at[None, :]
    tl.store(g_out + at, log_decay(a, A_log[None, :], dt_bias[None, :]), mask=each)
    tl.store(beta_out + at, sigmoid(b), mask=each)


@triton.jit
def unit_lower_inverse(L, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 for a strictly lower triangular L [C, C].

    Inverts the diagonal blocks, D, by forward substitution. With M the blocks below the
    diagonal and N = D M, which is nilpotent, the inverse is (I + N)^-1 D. Powers of L itself would
    overflow if keys repeat.
    """
    BLOCKS: tl.constexpr = C // B
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    D = -tl.sum(tl.where(same, tl.reshape(L, [BLOCKS, B, BLOCKS, B]), 0.0), 2)
    at = tl.arange(0, B)
    for i in range(2, B):
        is_row = (at == i)[None, :, None]
        row = tl.sum(tl.where(is_row, D, 0.0), 1)  # [BLOCKS, B]
        row += tl.sum(row[:, :, None] * D, 1)
        D = tl.where(is_row, row[:, None, :], D)
    D += (at[:, None] == at[None, :]).to(tl.float32)[None, :, :]
    D = tl.reshape(tl.where(same, D[:, :, None, :], 0.0), [C, C])
    c = tl.arange(0, C)
    below = (c // B)[:, None] > (c // B)[None, :]
    N = tl.dot(D, tl.where(below, L, 0.0), input_precision=PRECISION)
    inverse = D  # (I - N + N^2 - N^3) D, from the inside out
    for _ in tl.static_range(BLOCKS - 1):
        inverse = D - tl.dot(N, inverse, input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize=["T", "N", "slots"])
def chunk_matrices(
    q, k, g, beta, step, inverse, attention, T, N, slots,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, INVERSE_PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + L)^-1 diag(beta) and P of a chunk and value head, to [T, HV, C]; grid (chunks, HV)."""
    DRAFTS: tl.constexpr = W - GRID
    hv = tl.program_id(1)
    i, j = row_of_chunk(step, tl.program_id(0), N, T, DRAFTS + 2, C)
    if i >= N:
        return
    page, begin, n, c, _, _, fault = load_row(step, i, T, slots, DRAFTS)
    if (page < 0) | (fault != 0):
        return
    _, t, live = chunk_tokens(c, begin, n, j, 0, C, C)
    k_at, at = tl.arange(0, BK), tl.arange(0, C)
    inside = live[:, None] & (k_at < K)[None, :]
    from_ = (t * H + hv // R)[:, None] * K + k_at[None, :]
    to = (t * H * R + hv)[:, None] * C + at[None, :]
    g_t = tl.load(g + t * H * R + hv, mask=live, other=0.0)
    beta_t = tl.load(beta + t * H * R + hv, mask=live, other=0.0)
    # Each sum is computed by itself: the difference of two sums would cancel small ones.
    strictly = at[:, None] > at[None, :]
    decay = tl.exp(tl.cumsum(tl.where(strictly, g_t[:, None], 0.0), 0))
    keys = tl.load(k + from_, mask=inside, other=0.0)
    queries = tl.load(q + from_, mask=inside, other=0.0)
    qk = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    P = tl.where(at[:, None] >= at[None, :], qk * decay, 0.0)
    tl.store(attention + to, P.to(attention.dtype.element_ty), mask=live[:, None])
    kk = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    L = tl.where(strictly, beta_t[:, None] * kk * decay, 0.0)
    inv = unit_lower_inverse(L, C, INVERSE_PRECISION) * beta_t[None, :]
    tl.store(inverse + to, inv.to(inverse.dtype.element_ty), mask=live[:, None])
