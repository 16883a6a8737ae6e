"""The sigmoid gate on the shared expert's output, and the sum with the routed experts' output."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check, sizes


def shared_expert_gate(
    *, x: Tensor, weight: Tensor, shared_: Tensor, routed: Tensor | None = None
) -> None:
    """shared_ = sigmoid(x · weight) shared_, plus routed if given, in fp32.

    Sums have a fixed order, so a token's bits do not depend on the rest of the batch.

    Shapes:
        x: [T, D], any stride of dim 0
        weight: [1, D], fp32 or x's dtype
        shared_, routed: [T, D], any stride of dim 0; shared_ in place

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen3NextSparseMoeBlock` of transformers.
    """
    op = "shared_expert_gate"
    run = dispatch.implementation(op, x.device)
    T, D = sizes(op, "x", x, 2)
    check(op, "x", x, (T, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (1, D), (x.dtype, *FLOAT), x.device)
    check(op, "shared_", shared_, (T, D), (x.dtype,), x.device)
    if routed is not None:
        check(op, "routed", routed, (T, D), (x.dtype,), x.device)
    run(x, weight, shared_, routed)
