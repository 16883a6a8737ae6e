"""The native gated delta rule."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
gated_delta_rule = torch.ops.qwen3next.gated_delta_rule.default


@torch.library.register_fake("qwen3next::gated_delta_rule")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return v.new_empty(v.shape)
