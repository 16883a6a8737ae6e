"""The sigmoid gate on the full-attention output."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, check_contiguous, sizes


def output_gate(*, x_: Tensor, gate: Tensor) -> None:
    """x_ *= sigmoid(gate), in fp32.

    Shapes:
        x_: [T, Hq, D] contiguous, in place
        gate: [T, Hq, D], any strides but the last

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen3NextAttention` of transformers.
    """
    op = "output_gate"
    run = dispatch.implementation(op, x_.device)
    T, H, D = sizes(op, "x_", x_, 3)
    check(op, "x_", x_, (T, H, D), ACTIVATIONS, x_.device)
    check_contiguous(op, "x_", x_)
    check(op, "gate", gate, (T, H, D), (x_.dtype,), x_.device)
    run(x_, gate)
