"""What a backend of the convolution takes, and the checks of it; cpu.cpp checks the same."""

from typing import NamedTuple

from torch import Tensor

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
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

WIDTH = 4


class ConvInputs(NamedTuple):
    """Shapes: q, k [T, H, K], v [T, H, R], R = HV / H * V; any strides but the last"""

    q: Tensor
    k: Tensor
    v: Tensor


def check_arguments(x: ConvInputs, weight: Tensor, pool: StatePool, step: Step) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op, (q, k, v) = "causal_conv1d", x
    (T, H, K), (_, _, R) = sizes(op, "q", q, 3), sizes(op, "v", v, 3)
    check(op, "q", q, (T, H, K), ACTIVATIONS, q.device)
    check(op, "k", k, (T, H, K), (q.dtype,), q.device)
    check(op, "v", v, (T, H, R), (q.dtype,), q.device)
    check_convolution(q, H * (2 * K + R), weight, pool)
    check_page(op, "span", pool.span, (2,), INT, q.device)
    check_step(op, step, q.device)


def check_convolution(q: Tensor, C: int, weight: Tensor, pool: StatePool) -> None:
    """Check the weight and the pages' convolution inputs, of C channels."""
    op = "causal_conv1d"
    _, ring, _ = sizes(op, "conv_", pool.conv, 3)
    if ring < WIDTH:
        raise ValueError(
            f"{op}: conv_ holds {ring} inputs, fewer than the {WIDTH} of a convolution"
        )
    check_inputs(op, q, C, weight, pool.conv, pool.span)


def check_inputs(op: str, x: Tensor, C: int, weight: Tensor, conv: Tensor, span: Tensor) -> None:
    """Check the weight and the kept inputs of a convolution of C channels of x's dtype."""
    slots, _ = sizes(op, "span", span, 2)
    check(op, "weight", weight, (C, WIDTH), (x.dtype, *FLOAT), x.device)
    check_contiguous(op, "weight", weight)
    check_page(op, "conv_", conv, (conv.shape[1], C), (x.dtype,), x.device, slots)
