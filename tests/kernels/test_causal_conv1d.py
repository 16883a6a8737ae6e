"""The convolution against fp64, on pages in every state."""

import pytest
import torch
from state_pages import SHAPES, SMALL, Layer, Pool, Step, int32, rows_of
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn

from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def convolve(layer, pool, step, x):
    q, k, v = causal_conv1d(
        q=x["q"], k=x["k"], v=x["v"], weight=layer.weight,
        conv_=pool.conv_, span=pool.span_, **step.tensors(),
    )  # fmt: skip
    return torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 200])
def test_fresh_rows(backend, T, dtype):
    shape, W = SHAPES[T % len(SHAPES)], 4
    layer, pool, step = Layer.random(shape, dtype), Pool(shape, 3, W, dtype), Step(((1, 0, T),))
    x = layer.projections(T, dtype)
    out = convolve(layer, pool, step, x)
    assert_close("causal_conv1d", dtype, out, layer.convolved(x))
    inputs = torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1)
    history = torch.cat([inputs.new_zeros(3, shape.C), inputs])
    kept = history if T <= W else history[-3:]
    assert torch.equal(pool.conv_[1, : len(kept)], kept)
    assert (pool.span_ == -1).all()
    pool.assert_untouched_but([1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_anywhere(backend, shape):
    T, W = 75, 2
    layer = Layer.random(shape)
    x = layer.projections(T)
    whole = layer.convolved(x)
    for cut in (1, 2, 3, 4, 70):
        pool = Pool(shape, 2, W)
        convolve(layer, pool, Step(((1, 0, cut),)), rows_of(x, 0, cut))
        pool.span_[1] = int32(0, cut) if cut <= W else int32(cut, 0)
        out = convolve(layer, pool, Step(((1, cut, T - cut),)), rows_of(x, cut, T))
        assert_close("causal_conv1d", torch.float32, out, whole[cut:])


def test_mixed_batch(backend):
    layer, W = Layer.random(SMALL), 3
    pool = Pool(SMALL, 6, W)
    first = layer.projections(9)
    convolve(layer, pool, Step(((4, 0, 6), (0, 0, 3))), first)
    pool.span_[4], pool.span_[0] = int32(6, 0), int32(0, 3)
    # Slot 0 keeps two of its three tokens, slot -1 is padding, slot 2 is fresh, slot 4 is empty.
    step = Step(((2, 0, 70), (-1, 5, 2), (0, 2, 3), (4, 6, 0)))
    x = layer.projections(step.T)
    out = convolve(layer, pool, step, x)
    assert_close("causal_conv1d", torch.float32, out[:70], layer.convolved(rows_of(x, 0, 70)))
    assert (out[70:72] == 0).all()
    survivors = {name: torch.cat([first[name][6:8], x[name][72:75]]) for name in "qkv"}
    assert_close("causal_conv1d", torch.float32, out[72:], layer.convolved(survivors)[2:])
    pool.assert_untouched_but([0, 2, 4])


def test_agrees_with_transformers(backend):
    shape = SHAPES[1]
    layer = Layer.random(shape)
    x = layer.projections(33)
    inputs = torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1)
    theirs = causal_conv1d_fn(inputs.t()[None], layer.weight, activation="silu")[0].t()
    out = convolve(layer, Pool(shape, 1, 1), Step(((0, 0, 33),)), x)
    assert_close("causal_conv1d", torch.float32, out, theirs)


@pytest.mark.parametrize(
    ("rows", "span", "complaint"),
    [
        (((7, 0, 2),), (0, 0), "row 0: slot 7 is not one of 4 slots"),
        (((-2, 0, 2),), (0, 0), "row 0: slot -2"),
        (((0, 0, 1), (1, 5, 1)), (6, 0), "row 1: slot 1 holds p0=6 w=0 .* c=5"),
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
        convolve(layer, pool, step, layer.projections(step.T))
    assert torch.equal(pool.raw, before)


def test_refuses_tokens_out_of_range(backend):
    layer, pool, step = Layer.random(SMALL), Pool(SMALL, 4, 2), Step(((0, 0, 1), (1, 0, 2)))
    with pytest.raises(RuntimeError, match="row 1: query_start_loc 1 to 3 is not a range of 2"):
        convolve(layer, pool, step, layer.projections(2))
    pool.assert_untouched_but([])


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"q": torch.zeros(3, 2, 16, dtype=torch.float64)}, ValueError, "q is torch.float64"),
        ({"k": torch.zeros(3, 2, 16, dtype=torch.float16)}, ValueError, "k is torch.float16"),
        ({"v": torch.zeros(4, 2, 48)}, ValueError, "v has shape"),
        ({"weight": torch.zeros(4, SMALL.C).t()}, ValueError, "weight"),
        ({"conv_": torch.zeros(2, SMALL.C, 5).transpose(1, 2)}, ValueError, "conv_"),
        ({"slot": torch.zeros(1, dtype=torch.int64)}, ValueError, "slot is torch.int64"),
        ({"q": torch.zeros(3, 2, 16, device="meta")}, (ValueError, NotImplementedError), "meta"),
    ],
)
def test_refuses_bad_arguments(backend, change, error, complaint):
    x = {"q": torch.zeros(3, 2, 16), "k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 48)}
    pool, weight = Pool(SMALL, 2, 2), torch.zeros(SMALL.C, 4)
    arguments = {
        **x, "weight": weight, "conv_": pool.conv_, "span": pool.span_,
        **Step(((0, 0, 3),)).tensors(), **change,
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        causal_conv1d(**arguments)
    pool.assert_untouched_but([])
