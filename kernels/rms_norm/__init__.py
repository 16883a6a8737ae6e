"""Zero-centred RMSNorm, optionally of x plus a residual."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check, sizes


class Unnormed(NamedTuple):
    """The arguments of `rms_norm`, for an op that reads its result. Shapes as there.

    Norm it exactly once, before anything else writes x: that adds x to `residual_`.
    """

    x: Tensor
    weight: Tensor
    eps: float
    residual_: Tensor | None = None

    def normed(self) -> Tensor:
        """Shapes: returns [T, D]"""
        return rms_norm(x=self.x, weight=self.weight, eps=self.eps, residual_=self.residual_)


def normed(x: Tensor | Unnormed) -> Tensor:
    """x, or the norm of an `Unnormed`. Shapes: returns [T, D]"""
    return x.normed() if isinstance(x, Unnormed) else x


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
    check_norm(op, x, weight, residual_)
    return run(x, weight, eps, residual_)


def check_norm(op: str, x: Tensor, weight: Tensor, residual_: Tensor | None) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are those of `rms_norm`."""
    T, D = sizes(op, "x", x, 2)
    check(op, "x", x, (T, D), ACTIVATIONS, x.device)
    check(op, "weight", weight, (D,), (x.dtype, *FLOAT), x.device)
    if residual_ is not None:
        check(op, "residual_", residual_, (T, D), (x.dtype,), x.device)
