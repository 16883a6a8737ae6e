"""The rows of a step in a kernel: loading, checking, and finding one by token or by chunk."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.step import GRID as _GRID
from qwen3next_plugin.kernels.step import Step

GRID = tl.constexpr(_GRID)
TOKENS, SLOT, CONTEXT = (tl.constexpr(f) for f in (faults.TOKENS, faults.SLOT, faults.CONTEXT))
SHARED = tl.constexpr(faults.SHARED)
MAX_INT = tl.constexpr(2**31 - 1)
LOOK = tl.constexpr(128)  # rows loaded together


class StepTensors(NamedTuple):
    """The tensors of a step, and the spans of the pages."""

    query_start_loc: Tensor
    slot: Tensor
    context_len: Tensor
    span: Tensor
    span_slot: int  # the stride between slots


def step_tensors(step: Step, span: Tensor) -> StepTensors:
    return StepTensors(step.query_start_loc, step.slot, step.context_len, span, span.stride(0))


@triton.jit
def load_range(step, i):
    """Row i, or rows i: page (int64), first token, end of its tokens, context length."""
    begin = tl.load(step.query_start_loc + i)
    end = tl.load(step.query_start_loc + i + 1)
    page = tl.load(step.slot + i).to(tl.int64)
    return page, begin, end, tl.load(step.context_len + i)


@triton.jit
def load_row(step, i, T, slots, DRAFTS: tl.constexpr):
    """Row i, or rows i: page (int64), first token, tokens, context length, start, end, fault.

    A row may be processed only if its page is not negative and its fault is 0.
    """
    page, begin, end, c = load_range(step, i)
    known = (page >= 0) & (page < slots)
    start = tl.load(step.span + page * step.span_slot, mask=known, other=0)
    last = tl.load(step.span + page * step.span_slot + 1, mask=known, other=0)
    n = end - begin
    continues = (start >= 0) & (start <= c) & (c <= last)
    continues = continues & (last - start <= DRAFTS + 1) & (c.to(tl.int64) + n <= MAX_INT)
    fault = tl.where(known & (c != 0) & (continues == 0), CONTEXT, 0)
    fault = tl.where((page != -1) & (known == 0), SLOT, fault)
    in_range = (begin >= 0) & (begin <= end) & (end <= T)
    fault = tl.where(in_range, fault, TOKENS)
    return page, begin, n, c, start, last, fault


@triton.jit
def state_position(c, start):
    """The position of the page's S; 0 for a fresh state."""
    return tl.where(c == 0, 0, start // GRID * GRID)


@triton.jit
def row_of_token(step, t, N):
    """The row of token t, or N if the token is after all rows."""
    i = 0
    for first in range(0, N, LOOK):
        at = first + tl.arange(0, LOOK)
        ends = tl.load(step.query_start_loc + 1 + at, mask=at < N, other=MAX_INT)
        i += tl.sum((ends <= t).to(tl.int32), 0)
    return i


@triton.jit
def rows_of_tokens(step, t, N):
    """The rows of tokens t [tokens]; N for tokens after all rows."""
    i = tl.zeros_like(t)
    for first in range(0, N, LOOK):
        at = first + tl.arange(0, LOOK)
        ends = tl.load(step.query_start_loc + 1 + at, mask=at < N, other=MAX_INT)
        i += tl.sum((ends[:, None] <= t[None, :]).to(tl.int32), 0)
    return i


@triton.jit
def row_of_chunk(step, index, N, T, LEAST: tl.constexpr, C: tl.constexpr):
    """The row of the index-th chunk of the step, and the chunk's number in it; N if there is none.

    Rows of at least LEAST tokens have chunks, which end at positions that are multiples of C. A row
    that is not a range of the T tokens has none. Counts the chunks of the rows before it.
    """
    i = 0
    before = 0
    total = 0
    for first in range(0, N, LOOK):
        at = first + tl.arange(0, LOOK)
        there = at < N
        begin = tl.load(step.query_start_loc + at, mask=there, other=0)
        end = tl.load(step.query_start_loc + at + 1, mask=there, other=0)
        c = tl.maximum(tl.load(step.context_len + at, mask=there, other=0), 0)
        n = end - begin
        counts = (begin >= 0) & (begin <= end) & (n >= LEAST) & (end <= T)
        chunks = tl.where(counts, (c % C + n - 1) // C + 1, 0)
        sums = total + tl.cumsum(chunks, 0)
        passed = there & (sums <= index)
        i += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, sums, 0), 0))
        total += tl.sum(chunks, 0)
    return i, index - before


def most_chunks(T: int, N: int, least: int, C: int) -> int:
    """Upper bound on the chunks of a step's rows of at least `least` tokens."""
    return T // C + 2 * min(N, T // least)


@triton.jit
def is_shared(step, i, page):
    """Whether an earlier row has the same page."""
    shared = 0
    for first in range(0, i, LOOK):
        at = first + tl.arange(0, LOOK)
        slots = tl.load(step.slot + at, mask=at < i, other=-1)
        shared += tl.sum((slots == page).to(tl.int32), 0)
    return (shared > 0) & (page >= 0)


@triton.jit
def record_fault(record, kind, row, page, begin, n, c, start, end, slots, T):
    """Record a fault, unless one is recorded already; kind 0 is no fault."""
    if kind != 0:
        wide = kind.to(tl.int64)
        if tl.atomic_cas(record, tl.zeros_like(wide), wide) == 0:
            tl.store(record + 1, row)
            tl.store(record + 2, page)
            tl.store(record + 3, begin)
            tl.store(record + 4, n)
            tl.store(record + 5, c)
            tl.store(record + 6, start)
            tl.store(record + 7, end)
            tl.store(record + 8, slots)
            tl.store(record + 9, T)


@triton.jit
def report_fault(step, record, i, T, slots, DRAFTS: tl.constexpr):
    """Record the fault of row i, if it has one; returns its kind."""
    page, begin, n, c, start, last, fault = load_row(step, i, T, slots, DRAFTS)
    fault = tl.where((fault == 0) & is_shared(step, i, page), SHARED, fault)
    record_fault(record, fault, i, page, begin, n, c, start, last, slots, T)
    return fault
