"""What the convolution asks of its arguments; cpu.cpp asks the same."""

from torch import Tensor

from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    INT,
    check,
    check_contiguous,
    check_page,
    check_step,
)

WIDTH = 4


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    conv_: Tensor,
    span: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op = "causal_conv1d"
    (T, H, K), R, ring = q.shape, v.shape[-1], conv_.shape[1]
    C = H * (2 * K + R)
    if ring < WIDTH:
        raise ValueError(f"{op}: conv_ holds {ring} inputs, fewer than the {WIDTH} it convolves")
    check(op, "q", q, (T, H, K), ACTIVATIONS, q.device)
    check(op, "k", k, (T, H, K), (q.dtype,), q.device)
    check(op, "v", v, (T, H, R), (q.dtype,), q.device)
    check(op, "weight", weight, (C, WIDTH), (q.dtype, *FLOAT), q.device)
    check_contiguous(op, "weight", weight)
    check_page(op, "conv_", conv_, (ring, C), (q.dtype,), q.device)
    check_page(op, "span", span, (2,), INT, q.device)
    check_step(op, query_start_loc, slot, context_len, q.device)
