"""The router: the experts of each token, and their weights."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, check, sizes


def router(*, logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The top_k experts by logit and their softmax weights, greatest first, in fp32.

    weight_e = exp(logit_e) / sum exp(logit), over all experts or, renormalised, over those
    chosen. Of equal logits the lower expert comes first. A token with NaN, with +inf or with only
    -inf has no softmax: its experts are the first top_k, its weights NaN.

    Shapes:
        logits: [T, E], any stride of dim 0
        returns weights [T, top_k] fp32, experts [T, top_k] int32

    Raises: ValueError: an argument's shape, stride, device or dtype; top_k not in [1, E].

    Source: `Qwen3NextTopKRouter` of transformers.
    """
    op = "router"
    run = dispatch.implementation(op, logits.device)
    T, E = sizes(op, "logits", logits, 2)
    check(op, "logits", logits, (T, E), ACTIVATIONS, logits.device)
    if not 1 <= top_k <= E:
        raise ValueError(f"{op}: top_k = {top_k} of {E} experts")
    return run(logits, top_k, renormalise)
