"""The native convolution."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.step import Step

native.load()
_op = torch.ops.qwen3next.dilated_conv1d.default


def run(
    x: Tensor, weight: Tensor, dilation: int, conv_: Tensor, span: Tensor, step: Step
) -> Tensor:
    """Shapes as in the public op."""
    rows = (step.query_start_loc, step.slot, step.context_len)
    return _op(x, weight, dilation, conv_, span, *rows)


@torch.library.register_fake("qwen3next::dilated_conv1d")
def _(x: Tensor, *others: Tensor | int) -> Tensor:
    return x.new_empty(x.shape)
