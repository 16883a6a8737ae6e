"""The native attention."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.paged_attention.default


@torch.library.register_fake("qwen3next::paged_attention")
def _(q: Tensor, *others: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape)
