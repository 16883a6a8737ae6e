"""The native gate."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native

native.load()
run = torch.ops.qwen3next.output_gate.default


@torch.library.register_fake("qwen3next::output_gate")
def _(x_: Tensor, gate: Tensor) -> None:
    return None
