"""The dilated convolution against torch's, on rings in every state."""

import pytest
import torch
from rings import Rings
from state_pages import Step
from torch.nn.functional import conv1d, pad, silu

from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.dilated_conv1d import dilated_conv1d
from qwen3next_plugin.kernels.pages import StatePool
from tolerances import assert_close

OP = "dilated_conv1d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAFTS = 2
CHANNELS = (40, 7, 1100)


def rings_of(slots, C, dilation, dtype=torch.float32):
    return Rings(slots, 3 * dilation + 1 + DRAFTS, C, dtype=dtype)


def inputs(T, C, dtype=torch.float32):
    return torch.randn(T, C + 5).to(dtype)[:, :C]


def convolve(x, weight, dilation, rings, *rows):
    step = Step(rows).bundle(len(x))
    return dilated_conv1d(
        x=x, weight=weight, dilation=dilation, conv_=rings.rings, span=rings.span, step=step
    )


def expected(x, weight, dilation):
    """Of a whole sequence, in fp64."""
    padded = pad(x.double().t(), (3 * dilation, 0))[None]
    out = conv1d(padded, weight.double()[:, None], groups=len(weight), dilation=dilation)
    return silu(out[0].t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3, 8, 64, 200])
@pytest.mark.parametrize("dilation", [1, 3])
def test_fresh_rows(cpu_backend, T, dilation, dtype):
    C = CHANNELS[T % 3]
    x, weight, rings = inputs(T, C, dtype), torch.randn(C, 4), rings_of(3, C, dilation, dtype)
    out = convolve(x, weight, dilation, rings, (1, 0, T))
    assert (out.dtype, out.shape) == (dtype, (T, C))
    assert_close(OP, dtype, out, expected(x, weight, dilation))
    last = range(max(0, T - 3 * dilation), T)
    assert torch.equal(rings.of(1, last), x[last.start :])
    assert (rings.span == -1).all()
    assert rings.untouched() == [0, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_split_anywhere(bits_level, dtype):
    """Chunks, single tokens, and a draft of which tokens are rejected."""
    T, C, dilation = 90, 40, 3
    x, weight = inputs(T, C, dtype), torch.randn(C, 4).to(dtype)
    whole = convolve(x, weight, dilation, rings_of(1, C, dilation, dtype), (0, 0, T))
    for cut in (1, 2, 4, 9, 10, 64, 70):
        rings = rings_of(1, C, dilation, dtype)
        assert torch.equal(convolve(x[:cut], weight, dilation, rings, (0, 0, cut)), whole[:cut])
        start = cut
        while start + 2 < T:
            rings.set_span(0, start, start)
            wrong = torch.cat([x[start : start + 1], inputs(DRAFTS, C, dtype)])
            convolve(wrong, weight, dilation, rings, (0, start, 1 + DRAFTS))
            rings.set_span(0, start, start + 1 + DRAFTS)
            out = convolve(x[start + 1 : start + 2], weight, dilation, rings, (0, start + 1, 1))
            assert torch.equal(out, whole[start + 1 : start + 2])
            rings.set_span(0, start + 2, start + 2)
            end = min(start + 2 + 17, T)
            rest = convolve(
                x[start + 2 : end], weight, dilation, rings, (0, start + 2, end - start - 2)
            )
            assert torch.equal(rest, whole[start + 2 : end])
            start = end


def test_mixed_batch(cpu_backend):
    """A fresh row, padding, a row after rejected drafts and an empty one."""
    C, dilation = 40, 3
    weight, rings = torch.randn(C, 4), rings_of(5, C, dilation)
    first = inputs(12, C)
    convolve(first, weight, dilation, rings, (4, 0, 9), (0, 0, 3))
    rings.set_span(4, 9, 9)
    rings.set_span(0, 0, 3)
    x = inputs(75, C)
    out = convolve(x, weight, dilation, rings, (2, 0, 70), (-1, 5, 2), (0, 2, 3), (4, 9, 0))
    assert_close(OP, torch.float32, out[:70], expected(x[:70], weight, dilation))
    assert (out[70:72] == 0).all()
    kept = torch.cat([first[9:11], x[72:]])
    assert_close(OP, torch.float32, out[72:], expected(kept, weight, dilation)[2:])
    assert rings.untouched() == [1, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gaps_it_is_the_other_convolution(bits_level, dtype):
    x, weight, rings = inputs(70, 48, dtype), torch.randn(48, 4), rings_of(1, 48, 1, dtype)
    out = convolve(x, weight, 1, rings, (0, 0, 70))
    q, k, v = (part[:, None] for part in x.split(16, dim=1))
    pool = StatePool(*[rings.span] * 5, rings_of(1, 48, 1, dtype).rings)
    parts = causal_conv1d(
        q=q, k=k, v=v, weight=weight, pool_=pool, step=Step(((0, 0, 70),)).bundle()
    )
    assert torch.equal(out, torch.cat([part.flatten(1) for part in parts], 1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"x": torch.zeros(2, 40, dtype=torch.float64)},
            "x is torch.float64 on cpu, not torch.bfloat16, torch.float16, torch.float32",
        ),
        ({"x": torch.zeros(40)}, r"x has shape \(40,?\), not 2 dims"),
        ({"weight": torch.zeros(4, 40).t()}, "weight"),
        ({"weight": torch.zeros(40, 3)}, "weight has shape"),
        ({"dilation": 0}, "too few for dilation 0"),
        ({"dilation": 2**62}, f"too few for dilation {2**62}"),
        ({"dilation": 4}, "conv_ holds 12 inputs, too few for dilation 4"),
        ({"conv_": torch.zeros(1, 12, 40)}, r"conv_ has shape \(1, 12, 40\), not \(2, 12, 40\)"),
        ({"conv_": torch.zeros(2, 12, 40).bfloat16()}, "conv_ is torch.bfloat16 on cpu, not "),
        ({"span": torch.zeros(2, 2)}, "span is torch.float32 on cpu, not torch.int32"),
    ],
)
def test_refuses_bad_arguments(cpu_backend, change, complaint):
    rings = rings_of(2, 40, 3)
    arguments = {"x": torch.zeros(2, 40), "weight": torch.zeros(40, 4), "dilation": 3}
    arguments |= {"conv_": rings.rings, "span": rings.span}
    with pytest.raises(ValueError, match=f"dilated_conv1d: .*{complaint}"):
        dilated_conv1d(**{**arguments, **change}, step=Step(((0, 0, 2),)).bundle())


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ((5, 0, 2), "row 0: slot 5 is not one of 2 slots"),
        ((1, 4, 1), "row 0: slot 1 holds start=6 end=8 .* c=4"),
        ((1, 9, 1), "row 0: slot 1 holds start=6 end=8 .* c=9"),
    ],
)
def test_refuses_rows_before_writing(cpu_backend, row, complaint):
    rings = rings_of(2, 40, 3)
    rings.set_span(1, 6, 8)
    with pytest.raises(RuntimeError, match=complaint):
        convolve(inputs(2, 40), torch.zeros(40, 4), 3, rings, row)
    assert rings.untouched() == [0, 1]
