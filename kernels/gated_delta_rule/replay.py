"""Loading a tile of S, and applying the window's tokens to it."""

import triton
import triton.language as tl

from qwen3next_plugin.kernels.gpu.rows import GRID


@triton.jit
def state_at(pages, page, hv, k_at, v_at, K: tl.constexpr, V: tl.constexpr):
    """Pointers to a tile of S, and the mask of what exists of it."""
    at = pages.state + page * pages.state_slot + (hv * K + k_at[:, None]) * V + v_at[None, :]
    return at, (k_at < K)[:, None] & (v_at < V)[None, :]


@triton.jit
def rounded(S, p, STATE: tl.constexpr):
    """S after position p, rounded to the pages' dtype if p + 1 is a grid point."""
    if tl.float32 == STATE:
        return S
    return tl.where((p + 1) // GRID * GRID == p + 1, S.to(STATE).to(tl.float32), S)


@triton.jit
def replay(
    S, pages, page, first, last, hv, k_at, v_at,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    STAGES: tl.constexpr = 2,
):  # fmt: skip
    """Apply the window's tokens at [first, last) to S, with STAGES - 1 loads in flight."""
    for p in tl.range(first, last, num_stages=STAGES):
        at = p % W
        key_at = pages.key + page * pages.key_slot + (at * H + hv // R) * K + k_at
        u_at = pages.u + page * pages.u_slot + (at * H * R + hv) * V + v_at
        key = tl.load(key_at, mask=k_at < K, other=0.0)
        u = tl.load(u_at, mask=v_at < V, other=0.0)
        g = tl.load(pages.g + page * pages.g_slot + at * H * R + hv)
        S = tl.fma(key[:, None], u[None, :], tl.exp(g) * S)
        S = rounded(S, p, pages.state.dtype.element_ty)
    return S
