"""The checks of the op's arguments; cpu.cpp checks the same."""

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH, check_inputs
from qwen3next_plugin.kernels.checks import ACTIVATIONS, INT, check, check_page, check_step, sizes
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
    if dilation < 1 or ring < reach(dilation):
        raise ValueError(f"{op}: conv_ holds {ring} inputs, too few for dilation {dilation}")
    check(op, "x", x, (T, C), ACTIVATIONS, x.device)
    check_inputs(op, x, C, weight, conv_, span)
    check_page(op, "span", span, (2,), INT, x.device)
    check_step(op, step, x.device)
