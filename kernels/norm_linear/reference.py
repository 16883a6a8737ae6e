"""The parts, one after the other."""

from torch import Tensor

from qwen3next_plugin.kernels.linear import reference as product
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.kernels.rms_norm import reference as norm


def run(x: Unnormed, weight: PackedWeight, other: PackedWeight | None) -> tuple[Tensor, ...]:
    """Shapes as in the public op."""
    normed = norm.run(*x)
    return tuple(
        product.run(normed, each, normed.dtype) for each in (weight, other) if each is not None
    )
