"""Causal depthwise convolution of width 4 with gaps between its taps, with SiLU, over rings."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.step import Step


def dilated_conv1d(
    *, x: Tensor, weight: Tensor, dilation: int, conv_: Tensor, span: Tensor, step: Step
) -> Tensor:
    """y_t = silu(sum_j weight[:, j] x_{t - (3 - j) dilation}), in fp32; keeps each page's inputs.

    Inputs before a sequence are zero. With dilation 1 it is `causal_conv1d`, whose rules of pages
    and of rolling back it follows: it reads `span`, which the layer's delta rule advances later.
    A token's bits do not depend on chunks, drafts or the rest of the batch.

    Shapes:
        x: [T, C], any stride of dim 0
        weight: [C, 4], fp32 or x's dtype
        conv_: [slots, 3 · dilation + 1 + num_drafts, C], x's dtype, in place; a slot is contiguous.
            The input at position p is at p modulo the ring's length.
        span: [slots, 2] int32 of the layer's pages
        returns [T, C]; zero in rows without a page

    Raises:
        ValueError: an argument's shape, stride, device or dtype; no dilation.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: `Qwen4ExpTextPLELayer` of transformers.
    """
    run = dispatch.implementation("dilated_conv1d", x.device)
    return run(x, weight, dilation, conv_, span, step)
