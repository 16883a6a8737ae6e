"""The router: the experts of each token, and their weights."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes


def router(*, logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The k experts with the greatest logits and their softmax weights, greatest first, in fp32.

    weight_e = exp(logit_e) / sum exp(logit), over all experts or, renormalised, over the k chosen.
    Of equal logits the lower expert comes first. A row with NaN, with +inf or with only -inf has no
    softmax: its experts are the first k, its weights NaN.

    Shapes:
        logits: [T, E], any row stride
        returns weights [T, k] fp32, experts [T, k] int32

    Raises: ValueError: an argument's shape, stride, device or dtype; k not in [1, E].

    Source: `Qwen3NextTopKRouter` of transformers.
    """
    op = "router"
    run = dispatch.implementation(op, logits.device)
    T, E = sizes(op, "logits", logits, 2)
    check(op, "logits", logits, (T, E), ACTIVATIONS, logits.device)
    if not 1 <= k <= E:
        raise ValueError(f"{op}: k = {k} of {E} experts")
    return run(logits, k, renormalise)
