"""The parts, one after the other."""

from torch import Tensor

from qwen3next_plugin.kernels.fused_moe import reference as experts
from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert
from qwen3next_plugin.kernels.linear import reference as product
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.kernels.rms_norm import reference as norm
from qwen3next_plugin.kernels.router import reference as routing


def run(
    x: Tensor | Unnormed,
    router: PackedWeight,
    top_k: int,
    renormalise: bool,
    w13: PackedWeight,
    w2: PackedWeight,
    shared: SharedExpert | None,
) -> Tensor:
    """Shapes as in the public op."""
    x = norm.run(*x) if isinstance(x, Unnormed) else x
    chosen = routing.run(product.run(x, router, x.dtype), top_k, renormalise)
    return experts.run(x, w13, w2, *chosen, shared)
