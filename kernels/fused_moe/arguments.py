"""What the op takes besides tensors, and the checks of packed experts."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.checks import FLOAT, check
from qwen3next_plugin.kernels.linear.packed_weight import PANEL, PackedWeight, check_weight


class SharedExpert(NamedTuple):
    """The expert that every token has, with weight sigmoid(x · gate).

    Shapes: w13 [2S, D]: W1 (gate), then W3 (up); w2 [D, S]; gate [1, D], fp32 or x's dtype
    """

    w13: PackedWeight
    w2: PackedWeight
    gate: Tensor


def check_packed(op: str, w13: PackedWeight, w2: PackedWeight, D: int, x: Tensor) -> None:
    """Raise unless the shapes are [E, 2I, D] and [E, D, I]."""
    check_weight(op, "w13", w13, 3, x.device)
    check_weight(op, "w2", w2, 3, x.device)
    E, _, I = w2.shape  # noqa: E741, the field's letter
    _check_shapes(op, "w13", w13, (E, 2 * I, D))
    _check_shapes(op, "w2", w2, (E, D, I))
    _check_inner(op, "packed weights have", I)


def check_shared(op: str, shared: SharedExpert, D: int, x: Tensor) -> None:
    """Raise unless the shapes are [2S, D], [D, S] and [1, D]."""
    check_weight(op, "shared.w13", shared.w13, 2, x.device)
    check_weight(op, "shared.w2", shared.w2, 2, x.device)
    S = shared.w2.shape[-1]
    _check_shapes(op, "shared.w13", shared.w13, (2 * S, D))
    _check_shapes(op, "shared.w2", shared.w2, (D, S))
    _check_inner(op, "the shared expert has", S)
    check(op, "shared.gate", shared.gate, (1, D), (x.dtype, *FLOAT), x.device)


def _check_shapes(op: str, name: str, weight: PackedWeight, shape: tuple[int, ...]) -> None:
    if weight.shape != shape:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, not {shape}")


def _check_inner(op: str, what: str, features: int) -> None:
    if features % PANEL:
        raise ValueError(f"{op}: {what} {features} inner features, no multiple of {PANEL}")
