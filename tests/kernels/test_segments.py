"""A long row split into segments: as an unsplit one, whatever other rows are in the batch."""

from dataclasses import replace

import pytest
import torch
from state_pages import Layer, Pool, Shape, Step, concatenated, int32, rows_of
from triton.runtime.interpreter import InterpreterBuilder

from tolerances import assert_close

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)

OP, DRAFTS = "gated_delta_rule", 2
ONE = Shape(1, 2, 16, 24)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Rows of 33 tokens are split at multiples of 32. Fresh rows: a last segment shorter than GRID, no
# split, draft, one that ends at a segment's end.
FIRST = Step(((1, 0, 101), (2, 0, 30), (3, 0, 2), (4, 0, 64)))
# They continue: inside a segment, padding, after a rejected draft, unsplit, empty.
SECOND = Step(((1, 101, 70), (-1, 0, 40), (3, 1, 33), (2, 30, 32), (4, 64, 0)))
THIRD = Step(((4, 64, 35), (1, 171, 3), (3, 34, 1), (2, 62, 0)))
STEPS = (FIRST, SECOND, THIRD)
# The same kinds of rows, fewer tokens.
SHORT = (
    Step(((1, 0, 70), (3, 0, 2), (4, 0, 64))),
    Step(((1, 70, 35), (-1, 0, 8), (3, 1, 33), (4, 64, 0))),
    Step(((4, 64, 3), (1, 105, 3), (3, 34, 1))),
)


def unsplit(monkeypatch, config):
    """The same sizes for a GPU that is full without splitting."""
    from qwen3next_plugin.kernels.gated_delta_rule import triton as layer

    monkeypatch.setattr(layer, "config_for", lambda device: replace(config, processors=0))


def lasting(shape: Shape, dtype: torch.dtype = FP32) -> Layer:
    """A layer whose S decays so slowly that S at a segment's start still matters at its end."""
    layer = Layer.random(shape, dtype)
    return replace(layer, dt_bias=layer.dt_bias - 6)


@pytest.mark.parametrize(
    ("shape", "dtype", "state_dtype"),
    [
        pytest.param(ONE, FP32, FP32, marks=pytest.mark.long),
        (Shape(1, 2, 48, 40), BF16, FP32),
        pytest.param(Shape(2, 2, 24, 17), FP16, BF16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_as_the_reference(backend, split_rows, monkeypatch, shape, dtype, state_dtype, size):
    layer, steps = lasting(shape, dtype), size(SHORT, STEPS)
    inputs = [layer.projections(step.T, dtype) for step in steps]

    def run() -> tuple[list[torch.Tensor], Pool]:
        pool = Pool(shape, 6, DRAFTS, dtype, state_dtype)
        return [layer.run(pool, *each) for each in zip(steps, inputs, strict=True)], pool

    bounded_by = BF16 if BF16 in (dtype, state_dtype) else dtype
    slots = size([1, 3, 4], [1, 2, 3, 4])
    outs, pool = run()
    unsplit(monkeypatch, split_rows)
    others = [run() for _ in range(size(0, 1))]
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    others.append(run())
    for expected, other in others:
        for ours, theirs in zip(outs, expected, strict=True):
            assert_close(OP, bounded_by, ours, theirs, by=backend)
        assert torch.equal(pool.span_, other.span_)
        for slot in slots:
            ours, theirs = pool.state_at_end(slot), other.state_at_end(slot)
            assert_close(OP, bounded_by, ours, theirs, by=backend)
            for ours, theirs in zip(pool.content(slot), other.content(slot), strict=True):
                assert_close(OP, bounded_by, ours, theirs, by=backend)
    pool.assert_untouched_but(slots)


def test_as_the_recurrence(backend, split_rows, size):
    shape, T = Shape(1, 2, 32, 48), size(100, 150)
    layer, pool = lasting(shape), Pool(shape, 1, DRAFTS)
    x = layer.recurrence_inputs(T)
    ref, S = layer.recurrence(x)
    outs = [
        layer.recur(pool, Step(((0, at, to - at),)), rows_of(x, at, to))
        for at, to in ((0, T // 2), (T // 2, T))
    ]
    assert_close(OP, FP32, torch.cat(outs), ref)
    assert_close(OP, FP32, pool.state_at_end(0), S)


@pytest.mark.long
def test_a_state_outlasts_many_segments(backend, split_rows):
    """Errors of the segments' products add up: over 20, TF32 would exceed bf16's tolerance."""
    shape, T = Shape(1, 1, 32, 16), 640
    layer, pool = lasting(shape, BF16), Pool(shape, 1, DRAFTS, BF16)
    layer = replace(layer, dt_bias=layer.dt_bias - 4)
    x = layer.recurrence_inputs(T, BF16)
    x["b"] = torch.where(torch.arange(T)[:, None, None] < 32, x["b"], -60.0)  # nothing later
    layer.recur(pool, Step(((0, 0, T),)), x)
    assert_close(OP, BF16, pool.state_at_end(0), layer.recurrence(x)[1])


@pytest.mark.long
def test_extreme_gates(backend, split_rows, size):
    """Decays from 1 to underflow and keys that repeat, over many segments."""
    layer, pool, T = Layer.random(ONE), Pool(ONE, 1, DRAFTS), size(120, 200)
    x = layer.recurrence_inputs(T)
    x["a"] = torch.where(torch.rand(x["a"].shape) < 0.5, -60.0, 60.0)
    x["a"][T // 5 : T - 60] = -60.0  # nothing decays
    x["b"] = torch.where(torch.rand(x["b"].shape) < 0.5, -30.0, 30.0)
    x["k"] = x["k"].clone()
    x["k"][1::2] = x["k"][0]
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    assert_close(OP, FP32, out, layer.recurrence(x)[0])


@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.long), BF16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(backend, split_rows, monkeypatch, dtype, size):
    layer = lasting(ONE, dtype)
    rows = {1: size(40, 90), 2: 32, 3: 2, 4: size(34, 47)}  # tokens by slot
    x = {slot: layer.projections(n, dtype) for slot, n in rows.items()}

    def run(*slots: int) -> dict[int, list[torch.Tensor]]:
        """Outputs and pages by slot."""
        pool = Pool(ONE, 5, DRAFTS, dtype)
        step = Step(tuple((slot, 0, rows[slot]) for slot in slots))
        out = layer.run(pool, step, concatenated(*(x[slot] for slot in slots)))
        outs = out.split([rows[slot] for slot in slots])
        return {slot: [part, *pool.content(slot)] for slot, part in zip(slots, outs, strict=True)}

    together = run(1, 2, 3, 4)
    runs = [run(4, 3, 2, 1), *map(run, size((1, 3), rows))]
    unsplit(monkeypatch, split_rows)
    runs.append(run(2, 3))
    for each in runs:
        for slot, expected in each.items():
            for ours, theirs in zip(together[slot], expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.long
def test_programs_in_any_order(backend, split_rows, monkeypatch, size):
    """No program of a launch reads or overwrites what another one of it writes."""
    layer = lasting(ONE)
    steps = size((Step(((1, 0, 40), (2, 0, 9))), Step(((1, 40, 35), (2, 9, 2)))), STEPS)
    inputs = [layer.projections(step.T) for step in steps]

    def run() -> list[torch.Tensor]:
        pool = Pool(ONE, 6, DRAFTS)
        return [*map(layer.run, [pool] * len(steps), steps, inputs), pool.raw]

    def backwards(self, *index: int) -> None:
        self.grid_idx = tuple(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True))

    forwards = run()
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    for ours, expected in zip(run(), forwards, strict=True):
        assert torch.equal(ours, expected)


def test_bad_rows_that_would_be_split(backend, split_rows, monkeypatch, size):
    """Their pages are not written, their outputs are NaN, and the good row has the same bits."""
    from qwen3next_plugin.kernels.gpu import faults

    layer, T = Layer.random(ONE), size(40, 70)
    x = layer.recurrence_inputs(5 * T)
    alone = Pool(ONE, 4, DRAFTS)
    expected = layer.recur(alone, Step(((1, 0, T),)), rows_of(x, 2 * T, 3 * T))
    pool = Pool(ONE, 4, DRAFTS)
    alone.span_[2] = pool.span_[2] = int32(6, 8)
    monkeypatch.setattr(faults, "checked", lambda out: out)
    step = Step(((2, 5, T), (9, 0, T), (1, 0, T), (-1, 0, T), (2, 9, T)))
    before, after, good, padding, last = layer.recur(pool, step, x).split(T)
    assert torch.stack([before, after, last]).isnan().all()
    assert (padding == 0).all()
    assert torch.equal(good, expected)
    assert torch.equal(pool.raw, alone.raw)
    with pytest.raises(RuntimeError, match=r"row [01]: slot"):
        faults.check(pool.raw.device)


def test_more_segments_than_there_is_room_for(backend, split_rows, monkeypatch):
    """With bad rows the good ones may overlap: nothing is written beyond the scratch memory."""
    from qwen3next_plugin.kernels.gated_delta_rule import triton as layer_

    class Watched:
        """The kernel, on scratch memory with canaries after it."""

        def __getitem__(self, grid, kernel=layer_.segment_starts):
            def launch(transitions, starts, *operands, **sizes):
                room = starts.new_full((2 * len(starts), *starts.shape[1:]), torch.nan)
                kernel[grid](transitions, room, *operands, **sizes)
                beyond.append(room[len(starts) :])

            return launch

    beyond, T = [], 100
    monkeypatch.setattr(layer_, "segment_starts", Watched())
    layer, pool = Layer.random(ONE), Pool(ONE, 5, DRAFTS)
    tensors = {
        "query_start_loc": int32(0, T, 0, T, 0, T),
        "slot": int32(0, 1, 2, 3, 4),
        "context_len": int32(0, 0, 0, 0, 0),
    }
    monkeypatch.setattr(Step, "tensors", lambda self: tensors)
    with pytest.raises(RuntimeError, match=f"row [13]: query_start_loc {T} to 0"):
        layer.recur(pool, Step(()), layer.recurrence_inputs(T))
    assert len(beyond) == 1
    assert beyond[0].isnan().all()
