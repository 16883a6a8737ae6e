"""The native convolution."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.causal_conv1d.arguments import check_arguments

native.load()
causal_conv1d = torch.ops.qwen3next.causal_conv1d.default


@torch.library.register_fake("qwen3next::causal_conv1d")
def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    check_arguments(q, k, v, *others)
    return q.new_empty(q.shape[0], q.shape[1] * (2 * q.shape[2] + v.shape[2]))
