"""The gated delta rule against the fp64 recurrence, on pages in every state."""

import pytest
import torch
from state_pages import SHAPES, SMALL, Layer, Pool, Shape, Step, concatenated, rows_of
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from tolerances import assert_close

OP = "gated_delta_rule"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_state_close(pool, slot, S, dtype=torch.float32):
    assert_close(OP, dtype, pool.state_at_end(slot), S)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 200])
def test_fresh_rows(backend, T, dtype):
    shape, num_drafts = SHAPES[T % len(SHAPES)], 1
    layer, pool, step = Layer.random(shape), Pool(shape, 3, num_drafts, dtype), Step(((1, 0, T),))
    x = layer.recurrence_inputs(T, dtype)
    out = layer.recur(pool, step, x)
    ref, S = layer.recurrence(x)
    assert_close(OP, dtype, out, ref)
    assert pool.span_[1].tolist() == ([T, T] if num_drafts + 1 < T else [0, T])
    assert_state_close(pool, 1, S, dtype)
    layer.recur(pool, Step(((1, T, 0),)), rows_of(x, 0, 0))
    assert pool.span_[1].tolist() == [T, T]
    assert_state_close(pool, 1, S, dtype)
    pool.assert_untouched_but([1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_anywhere(backend, few, shape):
    T, layer = 75, Layer.random(shape)
    x = layer.recurrence_inputs(T)
    ref, S = layer.recurrence(x)
    for cut in few([(3, 64)[SHAPES.index(shape) % 2]], (1, 2, 3, 64, 74)):
        pool = Pool(shape, 2, 2)
        layer.recur(pool, Step(((1, 0, cut),)), rows_of(x, 0, cut))
        out = layer.recur(pool, Step(((1, cut, T - cut),)), rows_of(x, cut, T))
        assert_close(OP, torch.float32, out, ref[cut:])
        assert_state_close(pool, 1, S)


def test_mixed_batch(backend):
    layer = Layer.random(SMALL)
    pool = Pool(SMALL, 7, num_drafts=2)
    first = layer.recurrence_inputs(10)
    layer.recur(pool, Step(((5, 0, 6), (0, 0, 3), (3, 0, 1))), first)
    # Fresh prefill, padding, verify after one of three drafts was rejected, empty, decode, prefill.
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
    expected = {2: [70, 70], 0: [2, 5], 6: [0, 0], 3: [1, 2], 5: [71, 71]}
    assert {slot: pool.span_[slot].tolist() for slot in expected} == expected
    pool.assert_untouched_but([0, 2, 3, 5, 6])


def test_tokens_of_no_row_are_zero(backend):
    layer, pool = Layer.random(SMALL), Pool(SMALL, 2, 1)
    out = layer.recur(pool, Step(((1, 0, 2),)), layer.recurrence_inputs(5))
    assert out[:2].abs().min() > 0
    assert (out[2:] == 0).all()


@pytest.mark.parametrize("T", [5, 130])
def test_bf16_state(backend, T):
    shape = SHAPES[1]
    layer = Layer.random(shape)
    pool = Pool(shape, 2, 1, torch.bfloat16, state_dtype=torch.bfloat16)
    x = layer.recurrence_inputs(T, torch.bfloat16)
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    ref, S = layer.recurrence(x)
    assert_close(OP, torch.bfloat16, out, ref)
    assert_state_close(pool, 0, S, torch.bfloat16)


def test_512_decode_steps(backend, few):
    steps, shape = few(64, 512), Shape(1, 1, 16, 24) if backend == "triton" else SMALL
    layer, pool = Layer.random(shape), Pool(shape, 1, 0)
    x = layer.recurrence_inputs(steps)
    ref, S = layer.recurrence(x)
    outs = [layer.recur(pool, Step(((0, t, 1),)), rows_of(x, t, t + 1)) for t in range(steps)]
    assert_close("state_after_512_steps", torch.float32, torch.cat(outs), ref)
    assert_close("state_after_512_steps", torch.float32, pool.state_at_end(0), S)


@pytest.mark.parametrize("T", [3, 130])
def test_extreme_gates(backend, T):
    """Decays from 1 to underflow and keys that repeat: where a masked exp would overflow."""
    layer, pool = Layer.random(SMALL), Pool(SMALL, 1, 2)
    x = layer.recurrence_inputs(T)
    x["a"] = torch.where(torch.rand(x["a"].shape) < 0.5, -60.0, 60.0)
    x["b"] = torch.where(torch.rand(x["b"].shape) < 0.5, -30.0, 30.0)
    x["k"] = x["k"].clone()
    x["k"][1::2] = x["k"][0]
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    assert_close(OP, torch.float32, out, layer.recurrence(x)[0])


def test_agrees_with_transformers(backend):
    shape, T = Shape(2, 4, 64, 32), 100
    layer, pool = Layer.random(shape), Pool(shape, 1, 0)
    x = layer.recurrence_inputs(T)
    out = layer.recur(pool, Step(((0, 0, T),)), x)
    a, b = x["a"].flatten(1), x["b"].flatten(1)
    g = -layer.A_log.exp() * torch.nn.functional.softplus(a + layer.dt_bias)
    q, k = (x[name].repeat_interleave(2, dim=1) for name in "qk")
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        expected, S = rule(
            q[None], k[None], x["v"][None], g=g[None], beta=b.sigmoid()[None],
            output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        assert_close("transformers", torch.float32, out, expected[0])
        assert_close("transformers", torch.float32, pool.state_at_end(0), S[0])


@pytest.mark.parametrize(
    ("name", "bad", "error"),
    [
        ("q", torch.zeros(2, 2, 16, dtype=torch.float64), ValueError),
        ("k", torch.zeros(2, 2, 16, dtype=torch.bfloat16), ValueError),
        ("v", torch.zeros(2, 4, 48)[..., ::2], ValueError),
        ("a", torch.zeros(2, 4, 1), ValueError),
        ("state_", torch.zeros(4, 4, 24, 16), ValueError),
        ("state_", torch.zeros(4, 4, 16, 24, dtype=torch.float16), ValueError),
        ("state_", torch.zeros(4, 4, 24, 16).transpose(2, 3), ValueError),
        ("key_", torch.zeros(4, 7, 2, 16), ValueError),
        ("span_", torch.zeros(4, 2, dtype=torch.int64), ValueError),
        ("g_", torch.zeros(4, 3, 4), ValueError),
        ("q", torch.zeros(2, 16), ValueError),
        ("v", torch.zeros(2, 4, 24, 1), ValueError),
        ("key_", torch.zeros(4), ValueError),
        ("span_", torch.zeros((), dtype=torch.int32), ValueError),
    ],
)
def test_refuses_bad_arguments(backend, name, bad, error):
    from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule

    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, 2), Step(((0, 0, 2),))
    arguments = {
        **layer.recurrence_inputs(2), "A_log": layer.A_log, "dt_bias": layer.dt_bias,
        "pool_": pool.pages(), "step": step.bundle(),
    }  # fmt: skip
    if name.endswith("_"):
        arguments["pool_"] = pool.pages()._replace(**{name.removesuffix("_"): bad})
    else:
        assert name in arguments
        arguments[name] = bad
    with pytest.raises(error, match=f"gated_delta_rule: .*{name}"):
        gated_delta_rule(**arguments)
    pool.assert_untouched_but([])
