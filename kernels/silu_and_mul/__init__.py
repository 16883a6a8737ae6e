"""SwiGLU between its products: SiLU of the gate times the rest."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes


def silu_and_mul(x: Tensor) -> Tensor:
    """out = silu(x[:, :I]) x[:, I:], in fp32, rounded once.

    Shapes:
        x: [T, 2I], any stride of dim 0
        returns [T, I] contiguous

    Raises: ValueError: the argument's shape, stride or dtype.

    Source: `Qwen3NextMLP` of transformers.
    """
    op = "silu_and_mul"
    run = dispatch.implementation(op, x.device)
    T, two_I = sizes(op, "x", x, 2)
    check(op, "x", x, (T, 2 * (two_I // 2)), ACTIVATIONS, x.device)
    return run(x)
