"""The native layer as torch sees it."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear.weight import FORMATS, Weight

native.load()


def run(x: Tensor, weight: Weight) -> Tensor:
    """Shapes as in the public op."""
    return torch.ops.qwen3next.linear(x, *parts(weight), weight.shape[0])


def parts(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """A weight as the native ops take it."""
    format = FORMATS.index(weight.format)
    return weight.packed, weight.scale, weight.zero, format, weight.group


@torch.library.register_fake("qwen3next::linear")
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, format: int, group: int, N: int
) -> Tensor:
    return x.new_empty(x.shape[0], N)
