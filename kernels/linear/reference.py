"""The layer as its equation, in fp32."""

from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight, unpack


def run(x: Tensor, weight: PackedWeight) -> Tensor:
    """Shapes as in the public op."""
    return (x.float() @ unpack(weight).T).to(x.dtype)
