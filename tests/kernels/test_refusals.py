"""Both ops refuse a step with an index out of range, before a byte is written."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_pages import SMALL, Layer, Pool, Step, int32

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.step import GRID

K_DRAFTS = 2
OPS = ("causal_conv1d", "gated_delta_rule")


def run(op, layer, pool, step, T=None):
    T = step.T if T is None else T
    if op == "gated_delta_rule":
        return layer.recur(pool, step, layer.recurrence_inputs(T))
    return layer.convolve(pool, step, layer.projections(T))


def test_grid_of_the_native_kernels():
    native.load()
    assert torch.ops.qwen3next.grid() == GRID


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("rows", "span", "complaint"),
    [
        (((7, 0, 2),), (0, 0), "row 0: slot 7 is not one of 4 slots"),
        (((-2, 0, 2),), (0, 0), "row 0: slot -2"),
        (((0, 0, 70), (1, 5, 1)), (6, 6), "row 1: slot 1 holds start=6 end=6 .* c=5"),
        (((0, 0, 1), (1, 9, 1)), (6, 8), "row 1: slot 1 holds start=6 end=8 .* c=9"),
        (((0, 0, 1), (1, 9, 70)), (6, 10), "row 1: slot 1 holds start=6 end=10"),
        (((0, 0, 1), (1, 6, 0)), (6, 99), "row 1: slot 1 holds start=6 end=99"),
        (((0, 0, 1), (1, 6, 1)), (7, 6), "row 1: slot 1 holds start=7 end=6"),
        (((0, 0, 1), (1, 1, 1)), (-1, 2), "row 1: slot 1 holds start=-1 end=2"),
        (((0, 0, 1), (1, -3, 1)), (-4, -2), "row 1: slot 1 holds start=-4 end=-2"),
        (((0, 0, 1), (1, -1, 1)), (0, 0), "row 1: slot 1 holds start=0 end=0 .* c=-1"),
        (((0, 0, 1), (1, 2**31 - 1, 1)), (2**31 - 1, 0), "row 1: slot 1 holds start=2147483647"),
        (((1, 0, 1), (1, 0, 1)), (0, 0), "row 1: slot 1 is used by an earlier row"),
    ],
)
def test_refused_before_writing(cpu_backend, op, rows, span, complaint):
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, K_DRAFTS), Step(rows)
    pool.span_[1] = int32(*span)
    before = pool.raw.clone()
    with pytest.raises(RuntimeError, match=complaint):
        run(op, layer, pool, step)
    assert torch.equal(pool.raw, before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("starts", "complaint"),
    [
        ((0, 1, 3), "row 1: query_start_loc 1 to 3 is not a range of 2"),
        ((0, 2, 1), "row 1: query_start_loc 2 to 1 is not a range of 2"),
        ((-1, 1, 2), "row 0: query_start_loc -1 to 1 is not a range of 2"),
    ],
)
def test_tokens_out_of_range(cpu_backend, op, starts, complaint, monkeypatch):
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, K_DRAFTS), Step(((0, 0, 1), (1, 0, 1)))
    tensors = {**step.tensors(), "query_start_loc": int32(*starts)}
    monkeypatch.setattr(Step, "tensors", lambda self: tensors)
    with pytest.raises(RuntimeError, match=complaint):
        run(op, layer, pool, step)
    pool.assert_untouched_but([])


@pytest.mark.parametrize(
    ("op", "part"),
    [
        ("causal_conv1d", "conv"),
        *(("gated_delta_rule", part) for part in ("state", "key", "u", "g")),
    ],
)
def test_fewer_slots_than_span_has(backend, op, part, monkeypatch):
    """A slot that `span` has may be beyond the end of another tensor."""
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, K_DRAFTS), Step(((3, 0, 2),))
    pages = pool.pages()
    short = pages._replace(**{part: getattr(pages, part)[:3]})
    monkeypatch.setattr(pool, "pages", lambda: short)
    with pytest.raises(ValueError, match=rf"{op}: {part}_ has shape \(3, .*, not \(4, "):
        run(op, layer, pool, step)
    pool.assert_untouched_but([])


near = st.one_of(st.integers(-3, 30), st.sampled_from([2**31 - 1, -(2**31)]))


@pytest.mark.parametrize("op", OPS)
@given(near, near, near, st.integers(0, 5))
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_continues_only_where_the_page_stands(cpu_backend, op, start, end, c, n):
    """For any span of a page: the rule of docs/state.md, or an error."""
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 2, K_DRAFTS), Step(((1, c, n),))
    pool.raw[1] = 0
    pool.span_[1] = int32(start, end)
    before = pool.raw.clone()
    if c == 0 or (0 <= start <= c <= end <= start + K_DRAFTS + 1 and c + n < 2**31):
        run(op, layer, pool, step)
        pool.raw[1] = before[1]
    else:
        with pytest.raises(RuntimeError, match=rf"row 0: slot 1 holds start={start} end={end} "):
            run(op, layer, pool, step)
    assert torch.equal(pool.raw, before)


@pytest.mark.parametrize("op", OPS)
def test_positions_that_an_int32_cannot_hold(cpu_backend, op):
    last = 2**31 - 1
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 2, K_DRAFTS), Step(((1, last, 1),))
    pool.span_[1] = int32(last, last)
    before = pool.raw.clone()
    with pytest.raises(RuntimeError, match=r"row 0: slot 1 .* c=2147483647"):
        run(op, layer, pool, step)
    assert torch.equal(pool.raw, before)
