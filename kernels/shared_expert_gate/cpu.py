"""The native gate."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.shared_expert_gate.default


@torch.library.register_fake("qwen3next::shared_expert_gate")
def _(x: Tensor, weight: Tensor, shared_: Tensor, routed: Tensor | None) -> None:
    return None
