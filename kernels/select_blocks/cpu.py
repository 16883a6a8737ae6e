"""The native selection."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.select_blocks.default


@torch.library.register_fake("qwen3next::select_blocks")
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    T, top_k = len(q), others[-1]
    return q.new_empty(T, top_k, dtype=torch.int32), q.new_empty(T, dtype=torch.int32)
