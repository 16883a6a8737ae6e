"""A norm, the router and the experts as one op: every call of an op costs time."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes
from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert, check_packed, check_shared
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight, check_weight
from qwen3next_plugin.kernels.rms_norm import Unnormed, check_norm


def sparse_moe(
    x: Tensor | Unnormed,
    *,
    router: PackedWeight,
    top_k: int,
    renormalise: bool,
    w13: PackedWeight,
    w2: PackedWeight,
    shared: SharedExpert | None = None,
) -> Tensor:
    """`rms_norm` of an `Unnormed`; `linear` by the router's weight; `router`; `fused_moe`.

    Updates `x.residual_`.

    Shapes: those of these ops; router [E, D]; returns [T, D]

    Raises: ValueError for an argument's shape, stride, device or dtype.

    Source: `Qwen3NextSparseMoeBlock` of transformers.
    """
    op = "sparse_moe"
    of = x.x if isinstance(x, Unnormed) else x
    run = dispatch.implementation(op, of.device)
    T, D = sizes(op, "x", of, 2)
    if isinstance(x, Unnormed):
        check_norm(op, x.x, x.weight, x.residual_)
    else:
        check(op, "x", of, (T, D), ACTIVATIONS, of.device)
    check_weight(op, "router", router, 2, of.device)
    check_packed(op, w13, w2, D, of)
    if router.shape != (len(w13.packed), D):
        raise ValueError(f"{op}: router has shape {router.shape}, w13 {w13.shape}")
    if not 1 <= top_k <= len(w13.packed):
        raise ValueError(f"{op}: top_k = {top_k} of {len(w13.packed)} experts")
    if shared is not None:
        check_shared(op, shared, D, of)
    return run(x, router, top_k, renormalise, w13, w2, shared)
