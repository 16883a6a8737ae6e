"""The op's weights, and the checks of its arguments."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    check,
    check_contiguous,
    check_page,
    sizes,
)
from qwen3next_plugin.kernels.linear.packed_weight import PANEL, PackedWeight, check_weight


class HyperConnectionWeights(NamedTuple):
    """The parameters of one connection.

    Shapes, with `hc` streams of D features and rank L:
        norm: [hc · D] (zero-centred), fp32 or the activations' dtype
        down: [L, hc · D], up: [hc · D, L]: both packed, in any formats, with D a multiple of 16;
            or both of the activations' dtype
        inject: [hc, hc · D], fp32 or the activations' dtype; None: of a final mixer
    """

    norm: Tensor
    down: Tensor | PackedWeight
    up: Tensor | PackedWeight
    inject: Tensor | None


def takes_packed(D: int) -> bool:
    """Whether the weights may be packed: a stream of D features is whole panels."""
    return D % PANEL == 0


def check_streams(
    op: str, streams_: Tensor, block: Tensor | None, injection: Tensor | None
) -> None:
    """Raise ValueError unless the streams are [T, hc, D], and what is added to them fits."""
    T, hc, D = sizes(op, "streams_", streams_, 3)
    check_page(op, "streams_", streams_, (hc, D), ACTIVATIONS, streams_.device)
    if block is not None:
        check(op, "block", block, (T, D), (streams_.dtype,), streams_.device)
    elif injection is not None:
        raise ValueError(f"{op}: injection is given, but no block")
    if injection is not None:
        check(op, "injection", injection, (T, hc), FLOAT, streams_.device)
        check_contiguous(op, "injection", injection)


def check_weights(op: str, weights: HyperConnectionWeights, streams_: Tensor) -> None:
    """Raise ValueError unless the weights fit the streams."""
    norm, down, up, inject = weights
    (_, hc, D), L = streams_.shape, down.shape[0]
    parameters, device = (streams_.dtype, *FLOAT), streams_.device
    check(op, "norm", norm, (hc * D,), parameters, device)
    if isinstance(down, PackedWeight) != isinstance(up, PackedWeight):
        raise ValueError(f"{op}: one of down and up is packed, the other is not")
    if isinstance(up, PackedWeight) and not takes_packed(D):
        raise ValueError(f"{op}: packed weights of {D} features, no multiple of {PANEL}")
    for name, weight, shape in (("down", down, (L, hc * D)), ("up", up, (hc * D, L))):
        if isinstance(weight, PackedWeight):
            check_weight(op, name, weight, 2, device)
            if weight.shape != shape:
                raise ValueError(f"{op}: {name} has shape {weight.shape}, not {shape}")
        else:
            check(op, name, weight, shape, (streams_.dtype,), device)
            check_contiguous(op, name, weight)
    if inject is not None:
        check(op, "inject", inject, (hc, hc * D), parameters, device)
        check_contiguous(op, "inject", inject)
