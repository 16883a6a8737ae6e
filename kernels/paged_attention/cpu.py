"""The native attention; of a selection, not native yet."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.paged_attention import reference
from qwen3next_plugin.kernels.paged_attention.selection import Selection

native.load()


def run(*arguments: Tensor | float | Selection | None) -> Tensor:
    """Shapes as in the public op."""
    if any(isinstance(argument, Selection) for argument in arguments):
        return reference.run(*arguments)
    return torch.ops.qwen3next.paged_attention.default(*arguments[:9])


@torch.library.register_fake("qwen3next::paged_attention")
def _(q: Tensor, *others: Tensor | float | None) -> Tensor:
    return q.new_empty(q.shape)
