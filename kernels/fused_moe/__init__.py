"""Routed experts: the outputs of each token's top-k experts, weighted and summed."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, INT, check, check_contiguous


def fused_moe(
    *, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor
) -> Tensor:
    """out = sum_j weight_j W2_e (silu(W1_e x) * W3_e x), e = topk_ids[j].

    Products are summed in fp32; silu(…) * … is rounded to x's dtype. A token's experts are added in
    the order of their ids, so its bits do not depend on the rest of the batch.

    Shapes:
        x: [T, D], any row stride
        w13: [E, 2I, D], x's dtype: rows of W1 (gate), then of W3 (up); w2: [E, D, I]
        topk_weights: [T, k] fp32, topk_ids: [T, k] int32
        returns [T, D]

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: an id that is no expert.

    Source: `Qwen3NextSparseMoeBlock` of transformers, without router and shared expert.
    """
    op = "fused_moe"
    run = dispatch.implementation(op, x.device)
    (T, D), (E, two_I, _), k = x.shape, w13.shape, topk_ids.shape[1]
    check(op, "x", x, (T, D), ACTIVATIONS, x.device)
    check(op, "w13", w13, (E, 2 * (two_I // 2), D), (x.dtype,), x.device)
    check(op, "w2", w2, (E, D, two_I // 2), (x.dtype,), x.device)
    check(op, "topk_weights", topk_weights, (T, k), FLOAT, x.device)
    check(op, "topk_ids", topk_ids, (T, k), INT, x.device)
    for name, tensor in (("w13", w13), ("w2", w2), ("topk_weights", topk_weights)):
        check_contiguous(op, name, tensor)
    check_contiguous(op, "topk_ids", topk_ids)
    return run(x, w13, w2, topk_weights, topk_ids)
