"""The convolution by itself: one launch convolves, one keeps the inputs."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.causal_conv1d.arguments import check_arguments
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.convolution import (
    WIDTH,
    convolution,
    convolved_tile,
    kept_at,
)
from qwen3next_plugin.kernels.gpu.rows import load_row, row_of_token, rows, say_fault


def causal_conv1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    conv_: Tensor,
    span: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> Tensor:
    """Shapes as in the public op; returns [T, C]. A bad row is told by `faults.check`."""
    check_arguments(q, k, v, weight, conv_, span, query_start_loc, slot, context_len)
    (T, H, K), R, ring, N = q.shape, v.shape[-1], conv_.shape[1], len(slot)
    out = q.new_empty(T, H * (2 * K + R))
    if N == 0:
        return out.zero_()
    options = config_for(q.device).rowwise.options()
    for keeps in (False, True):
        _convolve[T + N * keeps, 3 * H](
            q, k, v, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], convolution(weight, conv_),
            rows(query_start_loc, slot, context_len, span), faults.record(q.device),
            out, T, N, len(span),
            H=H, K=K, R=R, RING=ring, KEEPS=keeps, BD=next_power_of_2(max(K, R)), **options,
        )  # fmt: skip
    return faults.checked(out)


@triton.jit(do_not_specialize=["T", "N", "slots"])
def _convolve(
    q, k, v, q_token, q_head, k_token, k_head, v_token, v_head,
    conv, rows, record, out, T, N, slots,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RING: tl.constexpr,
    KEEPS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token of one head of q, k or v; grid (T, 3 H), with KEEPS (T + N, 3 H).

    Convolves, or keeps the inputs in the page, once no program reads those they replace.
    """
    C: tl.constexpr = H * (2 * K + R)
    DRAFTS: tl.constexpr = RING - WIDTH
    part, h = tl.program_id(1) // H, tl.program_id(1) % H
    if tl.program_id(0) >= T:
        if tl.program_id(1) == 0:
            say_fault(rows, record, tl.program_id(0) - T, T, slots, DRAFTS)
        return
    i = tl.minimum(row_of_token(rows, tl.program_id(0), N), N - 1)
    page, begin, n, c, _, _, fault = load_row(rows, i, T, slots, DRAFTS)
    t = tl.program_id(0).to(tl.int64)
    covered = (t >= begin) & (t < begin + n)
    runs = covered & (page >= 0) & (fault == 0)
    p = c + (t - begin).to(tl.int32)
    at = tl.arange(0, BD)
    if part == 0:
        x, token, inside, channel = q + h * q_head, q_token, at < K, h * K + at
    elif part == 1:
        x, token, inside, channel = k + h * k_head, k_token, at < K, (H + h) * K + at
    else:
        x, token, inside, channel = v + h * v_head, v_token, at < R, 2 * H * K + h * R + at
    if KEEPS:
        stays = runs & ((n <= DRAFTS + 1) | (p >= c + n - (WIDTH - 1)))
        value = tl.load(x + t * token + at, mask=inside & stays, other=0.0)
        tl.store(kept_at(conv, page, p, channel, C, RING), value, mask=inside & stays)
    else:
        one = tl.arange(0, 1)
        y = convolved_tile(
            x, token, conv, page, p + one, t + one, c, (one == 0) & runs, channel, at, inside,
            True, C, RING,
        )  # fmt: skip
        nothing = tl.where(covered & (fault != 0), float("nan"), 0.0)
        y = tl.where(runs, y, nothing).to(out.dtype.element_ty)
        tl.store(out + (t + one)[:, None] * C + channel[None, :], y, mask=inside[None, :])
