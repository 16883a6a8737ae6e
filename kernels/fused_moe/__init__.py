"""Experts: the outputs of each token's top-k experts, and of a shared one, weighted and summed."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    INT,
    check,
    check_contiguous,
    sizes,
)
from qwen3next_plugin.kernels.fused_moe.arguments import SharedExpert, check_packed, check_shared
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight

__all__ = ["SharedExpert", "fused_moe"]


def fused_moe(
    *,
    x: Tensor,
    w13: Tensor | PackedWeight,
    w2: Tensor | PackedWeight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared: SharedExpert | None = None,
) -> Tensor:
    """out = sum_j weight_j W2_e (silu(W1_e x) * W3_e x), e = topk_ids[j].

    Products are summed in fp32; silu(…) * … is rounded to x's dtype. A token's experts are added in
    the order of their ids, the shared one at the end, so its bits do not depend on the rest of the
    batch.

    Shapes:
        x: [T, D], any stride of dim 0
        w13: [E, 2I, D], x's dtype: W1 (gate), then W3 (up); w2: [E, D, I]. Or both packed, in any
            formats, with I a multiple of 16: `linear` describes their arithmetic.
        topk_weights: [T, k] fp32, topk_ids: [T, k] int32; -1: no expert, and nothing is added
        shared: only beside packed weights, in any formats, with S a multiple of 16
        returns [T, D]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: another id that is no expert.

    Source: `Qwen3NextSparseMoeBlock` of transformers, without its router.
    """
    op = "fused_moe"
    run = dispatch.implementation(op, x.device)
    T, D = sizes(op, "x", x, 2)
    _, k = sizes(op, "topk_ids", topk_ids, 2)
    check(op, "x", x, (T, D), ACTIVATIONS, x.device)
    if isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight):
        check_packed(op, w13, w2, D, x)
    elif isinstance(w13, PackedWeight) or isinstance(w2, PackedWeight):
        name = "w13" if isinstance(w13, PackedWeight) else "w2"
        raise ValueError(f"{op}: {name} is packed, the other weight is not")
    else:
        E, two_I, _ = sizes(op, "w13", w13, 3)
        for name, w, shape in (
            ("w13", w13, (E, 2 * (two_I // 2), D)),
            ("w2", w2, (E, D, two_I // 2)),
        ):
            check(op, name, w, shape, (x.dtype,), x.device)
            check_contiguous(op, name, w)
    if shared is not None:
        if not isinstance(w13, PackedWeight):
            raise ValueError(f"{op}: shared is packed, the other weights are not")
        check_shared(op, shared, D, x)
    check(op, "topk_weights", topk_weights, (T, k), FLOAT, x.device)
    check(op, "topk_ids", topk_ids, (T, k), INT, x.device)
    check_contiguous(op, "topk_weights", topk_weights)
    check_contiguous(op, "topk_ids", topk_ids)
    return run(x, w13, w2, topk_weights, topk_ids, shared)
