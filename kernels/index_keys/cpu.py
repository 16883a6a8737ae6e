"""The native op."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.index_keys.default


@torch.library.register_fake("qwen3next::index_keys")
def _(qk: Tensor, q_weight: Tensor, *others: Tensor | float) -> Tensor:
    (T, width), d = qk.shape, q_weight.shape[0]
    return qk.new_empty(T, width // d - 1, d)
