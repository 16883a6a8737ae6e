"""The convolution against fp64, on pages in every state."""

from dataclasses import replace

import pytest
import torch
from state_pages import SHAPES, SMALL, Layer, Pool, Step, int32, rows_of
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn

from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def convolve(layer, pool, step, x):
    return torch.cat([part.flatten(1) for part in layer.convolve(pool, step, x)], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 200])
def test_fresh_rows(backend, T, dtype):
    shape, num_drafts = SHAPES[T % len(SHAPES)], 2
    layer, pool, step = (
        Layer.random(shape, dtype),
        Pool(shape, 3, num_drafts, dtype),
        Step(((1, 0, T),)),
    )
    x = layer.projections(T, dtype)
    out = convolve(layer, pool, step, x)
    assert_close("causal_conv1d", dtype, out, layer.convolved(x))
    inputs = torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1)
    for p in range(max(0, T - 3), T):
        assert torch.equal(pool.conv_[1, p % (4 + num_drafts)], inputs[p])
    assert (pool.span_ == -1).all()
    pool.assert_untouched_but([1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_anywhere(backend, few, shape):
    T, num_drafts = 75, 1
    layer = Layer.random(shape)
    x = layer.projections(T)
    whole = layer.convolved(x)
    for cut in few([(3, 70)[SHAPES.index(shape) % 2]], (1, 2, 3, 4, 70)):
        pool = Pool(shape, 2, num_drafts)
        convolve(layer, pool, Step(((1, 0, cut),)), rows_of(x, 0, cut))
        pool.span_[1] = int32(cut, cut)
        out = convolve(layer, pool, Step(((1, cut, T - cut),)), rows_of(x, cut, T))
        assert_close("causal_conv1d", torch.float32, out, whole[cut:])


def test_mixed_batch(backend):
    layer, num_drafts = Layer.random(SMALL), 2
    pool = Pool(SMALL, 6, num_drafts)
    first = layer.projections(9)
    convolve(layer, pool, Step(((4, 0, 6), (0, 0, 3))), first)
    pool.span_[4], pool.span_[0] = int32(6, 6), int32(0, 3)
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
    out = convolve(layer, Pool(shape, 1, 0), Step(((0, 0, 33),)), x)
    assert_close("causal_conv1d", torch.float32, out, theirs)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"q": torch.zeros(3, 2, 16, dtype=torch.float64)}, ValueError, "q is torch.float64"),
        ({"k": torch.zeros(3, 2, 16, dtype=torch.float16)}, ValueError, "k is torch.float16"),
        ({"v": torch.zeros(4, 2, 48)}, ValueError, "v has shape"),
        ({"weight": torch.zeros(4, SMALL.C).t()}, ValueError, "weight"),
        ({"conv_": torch.zeros(2, SMALL.C, 5).transpose(1, 2)}, ValueError, "conv_"),
        ({"conv_": torch.zeros(2, 3, SMALL.C)}, ValueError, "conv_ holds 3 inputs"),
        ({"conv_": torch.zeros(2, 6)}, ValueError, r"conv_ has shape \(2, 6\), not 3 dims"),
        ({"v": torch.zeros(3, 96)}, ValueError, r"v has shape \(3, 96\), not 3 dims"),
        ({"slot": torch.zeros(1, dtype=torch.int64)}, ValueError, "slot is torch.int64"),
        ({"q": torch.zeros(3, 2, 16, device="meta")}, (ValueError, NotImplementedError), "meta"),
    ],
)
def test_refuses_bad_arguments(backend, change, error, complaint):
    x = {"q": torch.zeros(3, 2, 16), "k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 48)}
    pool, weight = Pool(SMALL, 2, 2), torch.zeros(SMALL.C, 4)
    pages, step = pool.pages(), Step(((0, 0, 3),)).bundle()
    if "conv_" in change:
        change = {"pool_": pages._replace(conv=change["conv_"])}
    if "slot" in change:
        change = {"step": replace(step, **change)}
    arguments = {**x, "weight": weight, "pool_": pages, "step": step, **change}
    with pytest.raises(error, match=complaint):
        causal_conv1d(**arguments)
    pool.assert_untouched_but([])
