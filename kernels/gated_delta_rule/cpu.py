"""The native gated delta rule."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.gated_delta_rule.arguments import check_arguments

native.load()
gated_delta_rule = torch.ops.qwen3next.gated_delta_rule.default


@torch.library.register_fake("qwen3next::gated_delta_rule")
def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    check_arguments(q, k, v, *others)
    return v.new_empty(v.shape)
