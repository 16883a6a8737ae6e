"""The checks of the op's arguments; cpu.cpp checks the same."""

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH
from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    INT,
    check,
    check_contiguous,
    check_page,
    check_step,
    sizes,
)
from qwen3next_plugin.kernels.step import Step


def reach(dilation: int) -> int:
    """Inputs of one output, from the oldest that it reads to its own."""
    return (WIDTH - 1) * dilation + 1


def check_arguments(
    x: Tensor, weight: Tensor, dilation: int, conv_: Tensor, span: Tensor, step: Step
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op = "dilated_conv1d"
    T, C = sizes(op, "x", x, 2)
    _, ring, _ = sizes(op, "conv_", conv_, 3)
    slots, _ = sizes(op, "span", span, 2)
    if dilation < 1 or ring < reach(dilation):
        raise ValueError(f"{op}: conv_ holds {ring} inputs, too few for dilation {dilation}")
    check(op, "x", x, (T, C), ACTIVATIONS, x.device)
    check(op, "weight", weight, (C, WIDTH), (x.dtype, *FLOAT), x.device)
    check_contiguous(op, "weight", weight)
    check_page(op, "conv_", conv_, (ring, C), (x.dtype,), x.device, slots)
    check_page(op, "span", span, (2,), INT, x.device)
    check_step(op, step, x.device)
