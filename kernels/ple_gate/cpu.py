"""The native gate."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.ple_gate.arguments import PLENorms

native.load()
_op = torch.ops.qwen3next.ple_gate.default


def run(
    streams_: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: PLENorms,
    eps: float,
    block: Tensor | None,
    injection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    return _op(streams_, block, injection, keys, values, *norms, eps)


@torch.library.register_fake("qwen3next::ple_gate")
def _(
    streams_: Tensor, block: Tensor | None, injection: Tensor | None, keys: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape)
