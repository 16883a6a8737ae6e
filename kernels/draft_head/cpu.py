"""The native draft head."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.draft_head.default


@torch.library.register_fake("qwen3next::draft_head")
def _(x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    N = x.shape[0]
    return x.new_empty(N, dtype=torch.int64), x.new_empty(N, dtype=torch.float32)
