"""The convolution of width 4 over a row's inputs and the earlier ones in its page."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qwen3next_plugin.kernels.gpu.scalar_math import silu

WIDTH = tl.constexpr(4)


class Convolution(NamedTuple):
    """Weight [C, 4], and the inputs in the pages [slots, ring, C]."""

    weight: Tensor
    kept: Tensor
    kept_slot: int


def convolution(weight: Tensor, kept: Tensor) -> Convolution:
    return Convolution(weight, kept, kept.stride(0))


@triton.jit
def taps(conv, channel, mask):
    """The four weights of some channels."""
    at = conv.weight + channel * WIDTH
    w0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2, mask=mask, other=0.0).to(tl.float32)
    w3 = tl.load(at + 3, mask=mask, other=0.0).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def kept_at(conv, page, p, channel, C: tl.constexpr, RING: tl.constexpr):
    """Pointers to the inputs of position p in a page."""
    return conv.kept + page * conv.kept_slot + (p + RING) % RING * C + channel


@triton.jit
def kept_input(conv, page, p, channel, mask, C: tl.constexpr, RING: tl.constexpr):
    """The inputs at a position before the row; zero before the start of the sequence."""
    at = kept_at(conv, page, p, channel, C, RING)
    return tl.load(at, mask=mask & (p >= 0), other=0.0).to(tl.float32)


@triton.jit
def convolved(x0, x1, x2, x3, w, DTYPE: tl.constexpr):
    """silu of four inputs times their weights, rounded to the activations' dtype."""
    y = x0 * w[0] + x1 * w[1] + x2 * w[2] + x3 * w[3]
    return silu(y).to(DTYPE).to(tl.float32)


@triton.jit
def input_tile(
    x, token, conv, page, p, t, c, live, channel, at, inside,
    BACK: tl.constexpr, C: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """The inputs BACK tokens before each token of a tile, from the row or from its page."""
    own = live & (p - BACK >= c)
    from_ = x + (t - BACK)[:, None] * token + at[None, :]
    y = tl.load(from_, mask=own[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if BACK > 0:
        older = live & (p - BACK < c)
        mask = older[:, None] & inside[None, :]
        y += kept_input(conv, page, (p - BACK)[:, None], channel[None, :], mask, C, RING)
    return y


@triton.jit
def convolved_tile(
    x, token, conv, page, p, t, c, live, channel, at, inside,
    CONVOLVES: tl.constexpr, C: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """A tile [tokens, dims] of one head, convolved if CONVOLVES.

    x points to the head's first dim; `token` is the stride between tokens. p are the positions of
    tokens t of a row with context c. `at` are the dims, `channel` their channels.
    """
    y = input_tile(x, token, conv, page, p, t, c, live, channel, at, inside, 0, C, RING)
    if CONVOLVES:
        x2 = input_tile(x, token, conv, page, p, t, c, live, channel, at, inside, 1, C, RING)
        x1 = input_tile(x, token, conv, page, p, t, c, live, channel, at, inside, 2, C, RING)
        x0 = input_tile(x, token, conv, page, p, t, c, live, channel, at, inside, 3, C, RING)
        w = taps(conv, channel, inside)
        w = (w[0][None, :], w[1][None, :], w[2][None, :], w[3][None, :])
        y = convolved(x0, x1, x2, y, w, x.dtype.element_ty)
    return y
