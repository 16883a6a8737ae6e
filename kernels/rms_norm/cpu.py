"""The native norm."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.rms_norm.default


@torch.library.register_fake("qwen3next::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)
