"""Gated RMSNorm of the linear-attention output."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check, sizes


def rms_norm_gated(
    *, x: Tensor, z: Tensor, weight: Tensor, eps: float, sigmoid_gate: bool = False
) -> Tensor:
    """out = x rsqrt(mean x^2 + eps) weight gate(z) over the last dim, in fp32.

    The gate is silu, or the sigmoid.

    Shapes:
        x, z: [T, H, R, V], any strides but the last
        weight: [V] (not zero-centred), fp32 or x's dtype
        returns [T, H * R * V] contiguous

    Raises: ValueError: an argument's shape, stride, device or dtype.

    Source: `Qwen3NextRMSNormGated` and `Qwen4ExpTextRMSNormGated` of transformers.
    """
    op = "rms_norm_gated"
    run = dispatch.implementation(op, x.device)
    T, H, R, V = sizes(op, "x", x, 4)
    check(op, "x", x, (T, H, R, V), ACTIVATIONS, x.device)
    check(op, "z", z, (T, H, R, V), (x.dtype,), x.device)
    check(op, "weight", weight, (V,), (x.dtype, *FLOAT), x.device)
    return run(x, z, weight, eps, sigmoid_gate)
