"""The native router as torch sees it."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.router.default


@torch.library.register_fake("qwen3next::router")
def _(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    T = logits.shape[0]
    weights = logits.new_empty(T, top_k, dtype=torch.float32)
    return weights, logits.new_empty(T, top_k, dtype=torch.int32)
