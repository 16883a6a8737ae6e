"""Products by an engine's layers, with the norm before them."""

from typing import Any

from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.norm_linear import norm_linear
from qwen3next_plugin.kernels.rms_norm import Unnormed


def project(x: Tensor | Unnormed, *layers: Any) -> tuple[Tensor, ...]:
    """What each of one or two layers returns of x, or of its norm.

    Shapes: x [T, D], returns [T, N] of each
    """
    if not isinstance(x, Unnormed):
        return tuple(layer(x)[0] for layer in layers)
    weights = []
    for layer in layers:
        weight = packed_weight(layer)
        if weight is None:
            return project(x.normed(), *layers)
        weights.append(weight)
    return norm_linear(x, *weights)


def packed_weight(layer: Any) -> PackedWeight | None:
    """The weight of an engine's layer that does nothing but multiply by it in our kernel.

    Not of a layer with adapters: vLLM's has the weight's attributes, but not the weight; SGLang's
    has a hook that adds them.
    """
    packed = layer._modules.get("packed")
    if packed is None or layer._forward_hooks or getattr(layer, "bias", None) is not None:
        return None
    return packed.weight
