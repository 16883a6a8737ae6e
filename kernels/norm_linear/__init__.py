"""A norm and the linear layers that read it, as one op: every call of an op costs time."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight, check_weight
from qwen3next_plugin.kernels.rms_norm import Unnormed, check_norm


def norm_linear(
    x: Unnormed, weight: PackedWeight, other: PackedWeight | None = None
) -> tuple[Tensor, ...]:
    """`rms_norm`, and `linear` of its result by a weight, or by two. Updates `x.residual_`.

    Shapes: those of `rms_norm` and `linear`; weights [N, D]; returns [T, N] of each

    Raises: ValueError for an argument's shape, stride, device or dtype.
    """
    op, device = "norm_linear", x.x.device
    run = dispatch.implementation(op, device)
    check_norm(op, x.x, x.weight, x.residual_)
    for name, each in (("weight", weight), ("other", other)):
        if each is None:
            continue
        check_weight(op, name, each, 2, device)
        if each.shape[1] != x.x.shape[1]:
            raise ValueError(f"{op}: {name} has shape {each.shape}, x {tuple(x.x.shape)}")
    return run(x, weight, other)
