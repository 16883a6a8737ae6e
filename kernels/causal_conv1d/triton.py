"""The convolution by itself. In a layer it is part of the kernels of `gated_delta_rule`."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.causal_conv1d.arguments import ConvInputs, check_arguments
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.convolution import (
    WIDTH,
    convolution,
    convolved_tile,
    kept_at,
)
from qwen3next_plugin.kernels.gpu.rows import load_row, report_fault, rows_of_tokens, step_tensors
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

TOKENS = 16  # of a program


def run(x: ConvInputs, weight: Tensor, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op; returns [T, C]. `faults.check` raises for a bad row."""
    check_arguments(x, weight, pool, step)
    q, slots, N, ring = x.q, len(pool.span), len(step.slot), pool.conv.shape[1]
    T, H, _ = q.shape
    out = q.new_empty(T, len(weight))
    if N == 0:
        return out.zero_()
    config = config_for(q.device).rowwise
    operands = (convolution(weight, pool.conv), step_tensors(step, pool.span))
    for keeps in (False, True):
        first = 0
        for part in x:
            D = part.shape[-1]
            _convolve[-(-T // TOKENS) + N, H](
                part, *part.stride()[:2], *operands, faults.record(q.device), out,
                T, N, slots, first,
                H=H, C=out.shape[1], D=D, RING=ring, KEEPS=keeps,
                BT=TOKENS, BD=next_power_of_2(D), **config.options(),
            )  # fmt: skip
            first += H * D
    return faults.checked(out)


@triton.jit(do_not_specialize=["T", "N", "slots"])
def _convolve(
    x, token, head, conv, step, record, out, T, N, slots, first,
    H: tl.constexpr, C: tl.constexpr, D: tl.constexpr, RING: tl.constexpr,
    KEEPS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head of q, k or v, whose channels begin at `first`.

    The first launch convolves. The second (KEEPS) writes the inputs to the page, where the first
    still reads the old ones. Grid (blocks of tokens, then N rows to check for faults; H).
    """
    DRAFTS: tl.constexpr = RING - WIDTH
    h, block = tl.program_id(1), tl.program_id(0)
    blocks = (T + BT - 1) // BT
    if block >= blocks:
        if KEEPS & (h == 0):
            report_fault(step, record, block - blocks, T, slots, DRAFTS)
        return
    t = block * BT + tl.arange(0, BT)
    i = tl.minimum(rows_of_tokens(step, t, N), N - 1)
    page, begin, n, c, _, _, fault = load_row(step, i, T, slots, DRAFTS)
    covered = (t >= begin) & (t < begin + n)
    runs = covered & (page >= 0) & (fault == 0)
    p = c + t - begin
    t = t.to(tl.int64)
    page = page[:, None]
    at = tl.arange(0, BD)
    inside, channel = at < D, first + h * D + at
    x += h * head
    if KEEPS:
        stays = runs & ((n <= DRAFTS + 1) | (p >= c + n - (WIDTH - 1)))
        mask = stays[:, None] & inside[None, :]
        value = tl.load(x + t[:, None] * token + at[None, :], mask=mask, other=0.0)
        tl.store(kept_at(conv, page, p[:, None], channel[None, :], C, RING), value, mask=mask)
    else:
        y = convolved_tile(x, token, conv, page, p, t, c, runs, channel, at, inside, True, C, RING)
        nothing = tl.where(covered & (fault != 0), float("nan"), 0.0)
        y = tl.where(runs[:, None], y, nothing[:, None]).to(out.dtype.element_ty)
        mask = (t < T)[:, None] & inside[None, :]
        tl.store(out + t[:, None] * C + channel[None, :], y, mask=mask)
