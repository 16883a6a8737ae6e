"""The gated delta rule against the fp64 recurrence, on pages in every state."""

import pytest
import torch
from state_pages import SHAPES, SMALL, Layer, Pool, Shape, Step, concatenated, int32, rows_of
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from tolerances import assert_close

OP = "gated_delta_rule"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_state_close(pool, slot, S, dtype=torch.float32):
    assert_close(OP, dtype, pool.state_[slot], S)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 200])
def test_fresh_rows(backend, T, dtype):
    shape, W = SHAPES[T % len(SHAPES)], 2
    layer, pool, step = Layer.random(shape), Pool(shape, 3, W, dtype), Step(((1, 0, T),))
    x = layer.recurrence_inputs(T, dtype)
    out = layer.recur(pool, step, x)
    ref, S = layer.recurrence(x)
    assert_close(OP, dtype, out, ref)
    if T > W:
        assert pool.span_[1].tolist() == [T, 0]
        assert_state_close(pool, 1, S, dtype)
    else:
        assert pool.span_[1].tolist() == [0, T]
        assert (pool.state_[1] == 0).all()
        layer.recur(pool, Step(((1, T, 0),)), rows_of(x, 0, 0))
        assert pool.span_[1].tolist() == [T, 0]
        assert_state_close(pool, 1, S, dtype)
    pool.assert_untouched_but([1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_anywhere(backend, shape):
    T, layer = 75, Layer.random(shape)
    x = layer.recurrence_inputs(T)
    ref, S = layer.recurrence(x)
    for cut in (1, 2, 3, 64, 74):
        pool = Pool(shape, 2, 3)
        layer.recur(pool, Step(((1, 0, cut),)), rows_of(x, 0, cut))
        out = layer.recur(pool, Step(((1, cut, T - cut),)), rows_of(x, cut, T))
        layer.recur(pool, Step(((1, T, 0),)), rows_of(x, 0, 0))
        assert_close(OP, torch.float32, out, ref[cut:])
        assert_state_close(pool, 1, S)


def test_mixed_batch(backend):
    layer, W = Layer.random(SMALL), 3
    pool = Pool(SMALL, 7, W)
    first = layer.recurrence_inputs(10)
    layer.recur(pool, Step(((5, 0, 6), (0, 0, 3), (3, 0, 1))), first)
    # Fresh prefill, padding, verify after one of three drafts fell, empty, decode, prefill go on.
    step = Step(((2, 0, 70), (-1, 5, 2), (0, 2, 3), (6, 0, 0), (3, 1, 1), (5, 6, 65)))
    x = layer.recurrence_inputs(step.T)
    out = layer.recur(pool, step, x)
    assert (out[70:72] == 0).all()
    survivors = {
        (0, 70): rows_of(x, 0, 70),
        (72, 75): concatenated(rows_of(first, 6, 8), rows_of(x, 72, 75)),
        (75, 76): concatenated(rows_of(first, 9, 10), rows_of(x, 75, 76)),
        (76, 141): concatenated(rows_of(first, 0, 6), rows_of(x, 76, 141)),
    }
    for (begin, end), sequence in survivors.items():
        ref, _ = layer.recurrence(sequence)
        assert_close(OP, torch.float32, out[begin:end], ref[begin - end :])
    expected = {2: [70, 0], 0: [2, 3], 6: [0, 0], 3: [1, 1], 5: [71, 0]}
    assert {slot: pool.span_[slot].tolist() for slot in expected} == expected
    assert (pool.state_[6] == 0).all()
    pool.assert_untouched_but([0, 2, 3, 5, 6])


def test_tokens_of_no_row_are_zero(backend):
    layer, pool = Layer.random(SMALL), Pool(SMALL, 2, 2)
    out = layer.recur(pool, Step(((1, 0, 2),)), layer.recurrence_inputs(5))
    assert out[:2].abs().min() > 0
    assert (out[2:] == 0).all()


@pytest.mark.parametrize("T", [5, 130])
def test_bf16_state(backend, T):
    shape = SHAPES[1]
    layer = Layer.random(shape)
    pool = Pool(shape, 2, 2, torch.bfloat16, state_dtype=torch.bfloat16)
    x = layer.recurrence_inputs(T, torch.bfloat16)
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    ref, S = layer.recurrence(x)
    assert_close(OP, torch.bfloat16, out, ref)
    assert_state_close(pool, 0, S, torch.bfloat16)


def test_512_decode_steps(backend):
    steps, shape = 512, SMALL
    layer, pool = Layer.random(shape), Pool(shape, 1, 1)
    x = layer.recurrence_inputs(steps)
    ref, S = layer.recurrence(x)
    outs = [layer.recur(pool, Step(((0, t, 1),)), rows_of(x, t, t + 1)) for t in range(steps)]
    layer.recur(pool, Step(((0, steps, 0),)), rows_of(x, 0, 0))
    assert_close("state_after_512_steps", torch.float32, torch.cat(outs), ref)
    assert_close("state_after_512_steps", torch.float32, pool.state_[0], S)


@pytest.mark.parametrize("T", [3, 130])
def test_extreme_gates(backend, T):
    """Decays from 1 to underflow and keys that repeat: where a masked exp would overflow."""
    layer, pool = Layer.random(SMALL), Pool(SMALL, 1, 3)
    x = layer.recurrence_inputs(T)
    x["a"] = torch.where(torch.rand(x["a"].shape) < 0.5, -60.0, 60.0)
    x["b"] = torch.where(torch.rand(x["b"].shape) < 0.5, -30.0, 30.0)
    x["k"] = x["k"].clone()
    x["k"][1::2] = x["k"][0]
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    assert_close(OP, torch.float32, out, layer.recurrence(x)[0])


@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_agrees_with_transformers(backend, name):
    shape, T = Shape(2, 4, 64, 32), 100
    layer, pool = Layer.random(shape), Pool(shape, 1, 1)
    x = layer.recurrence_inputs(T)
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    a, b = x["a"].flatten(1), x["b"].flatten(1)
    g = -layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias)
    q, k = (x[name].repeat_interleave(2, dim=1) for name in "qk")
    expected, S = getattr(theirs, name)(
        q[None], k[None], x["v"][None], g=g[None], beta=b.sigmoid()[None],
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert_close(OP, torch.float32, out, expected[0])
    assert_state_close(pool, 0, S[0].transpose(1, 2))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
@pytest.mark.parametrize("prefix", [0, 7])
def test_grouping_leaves_no_trace(native_level, shape, prefix):
    """One by one, verified together, or rolled back and continued: the same bits."""
    W, T = 4, 12
    layer = Layer.random(shape, torch.bfloat16)
    first = layer.projections(prefix, torch.bfloat16)
    x, drafts = (layer.projections(n, torch.bfloat16) for n in (T, 40))

    def run(groups):
        """Each group: how many tokens come, and how many drafts follow them and fall."""
        pool = Pool(shape, 1, W, torch.bfloat16)
        if prefix:
            layer.run(pool, Step(((0, 0, prefix),)), first)
        outs, at = [], 0
        for n, rejected in groups:
            tokens = concatenated(rows_of(x, at, at + n), rows_of(drafts, at, at + rejected))
            out = layer.run(pool, Step(((0, prefix + at, n + rejected),)), tokens)
            outs.append(out[:n])
            at += n
        layer.run(pool, Step(((0, prefix + at, 0),)), rows_of(x, 0, 0))
        return torch.cat(outs), pool.state_, pool.conv_[:, :3], pool.span_

    one_by_one = run([(1, 0)] * T)
    for groups in ([(4, 0)] * 3, [(1, 3)] * T, [(2, 2), (3, 1), (1, 0), (1, 2), (4, 0), (1, 3)]):
        for ours, expected in zip(run(groups), one_by_one, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("rows", "span", "complaint"),
    [
        (((7, 0, 2),), (0, 0), "row 0: slot 7 is not one of 4 slots"),
        (((-2, 0, 2),), (0, 0), "row 0: slot -2"),
        (((0, 0, 70), (1, 5, 1)), (6, 0), "row 1: slot 1 holds p0=6 w=0 .* c=5"),
        (((0, 0, 1), (1, 9, 1)), (6, 2), "row 1: slot 1 holds p0=6 w=2 .* c=9"),
        (((0, 0, 1), (1, 9, 1)), (6, 99), "row 1: slot 1 holds p0=6 w=99"),
        (((0, 0, 1), (1, -3, 1)), (-4, 2), "row 1: slot 1 holds p0=-4 w=2"),
        (((1, 0, 1), (1, 0, 1)), (0, 0), "row 1: slot 1 is used by an earlier row"),
    ],
)
def test_refuses_before_writing(backend, rows, span, complaint):
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, 2), Step(rows)
    pool.span_[1] = int32(*span)
    before = pool.raw.clone()
    with pytest.raises(RuntimeError, match=complaint):
        layer.recur(pool, step, layer.recurrence_inputs(step.T))
    assert torch.equal(pool.raw, before)


@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("q", torch.zeros(2, 2, 16, dtype=torch.float64), ValueError),
        ("k", torch.zeros(2, 2, 16, dtype=torch.bfloat16), ValueError),
        ("v", torch.zeros(2, 4, 48)[..., ::2], ValueError),
        ("a", torch.zeros(2, 4, 1), ValueError),
        ("state_", torch.zeros(4, 4, 16, 24), ValueError),
        ("state_", torch.zeros(4, 4, 24, 16, dtype=torch.float16), ValueError),
        ("state_", torch.zeros(4, 4, 16, 24).transpose(2, 3), ValueError),
        ("span_", torch.zeros(4, 2, dtype=torch.int64), ValueError),
        ("decay_", torch.zeros(4, 3, 4), ValueError),
    ],
)
def test_refuses_bad_arguments(backend, name, bad, error):
    from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule

    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, 2), Step(((0, 0, 2),))
    pages = {name: getattr(pool, name) for name in ("state_", "key_", "u_", "decay_", "span_")}
    arguments = {"A_log": layer.A_log, "dt_bias": layer.dt_bias, **pages, **step.tensors()}
    with pytest.raises(error, match=f"gated_delta_rule: .*{name}"):
        gated_delta_rule(**{**layer.recurrence_inputs(2), **arguments, name: bad})
    pool.assert_untouched_but([])
