"""Zero-centred RMSNorm, optionally of x plus a residual."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check, sizes


def rms_norm(*, x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None = None) -> Tensor:
    """out = x rsqrt(mean x^2 + eps) (1 + weight), in fp32.

    With a residual: residual_ += x in its own dtype, and the norm of residual_ is returned.

    Shapes:
        x, residual_: [T, D], any stride of dim 0
        weight: [D], fp32 or x's dtype
        returns [T, D] contiguous

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen3NextRMSNorm` of transformers.
    """
    op = "rms_norm"
    run = dispatch.implementation(op, x.device)
    T, D = sizes(op, "x", x, 2)
    check(op, "x", x, (T, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (D,), (x.dtype, *FLOAT), x.device)
    if residual_ is not None:
        check(op, "residual_", residual_, (T, D), (x.dtype,), x.device)
    return run(x, weight, eps, residual_)
