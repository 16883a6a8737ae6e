"""The native layer as torch sees it."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear.packed_weight import ENCODINGS, PackedWeight

native.load()
_op = torch.ops.qwen3next.linear.default


def run(x: Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> Tensor:
    """Shapes as in the public op."""
    fp32 = out_dtype == torch.float32
    return _op(x, *parts(weight), weight.shape[0], fp32)


def parts(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """A weight as the native ops take it."""
    encoding = ENCODINGS.index(weight.encoding)
    return weight.packed, weight.scale, weight.zero, encoding, weight.group


@torch.library.register_fake("qwen3next::linear")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    encoding: int,
    group: int,
    N: int,
    fp32: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], N, dtype=torch.float32 if fp32 else x.dtype)
