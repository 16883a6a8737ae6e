"""Products by an engine's layers, with the norm before them."""

from typing import Any

from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.kernels.norm_linear import norm_linear
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.model.quantisation.packing import Packed


def project(x: Tensor | Unnormed, *layers: Any) -> tuple[Tensor, ...]:
    """Apply one or two layers to x, or to its norm, which also updates the residual.

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
    """The packed weight of a layer that only multiplies by it, else None.

    A layer with a bias or with adapters does more. With adapters vLLM wraps it in a module that
    passes on its attributes, and SGLang adds a hook to it.
    """
    packed = layer._modules.get("packed")
    if not isinstance(packed, Packed) or layer._forward_hooks:
        return None
    return packed.weight if getattr(layer, "bias", None) is None else None
