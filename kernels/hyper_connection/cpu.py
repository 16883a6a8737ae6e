"""The native connection."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.hyper_connection.arguments import HyperConnectionWeights
from qwen3next_plugin.kernels.linear.cpu import parts
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight

native.load()
_op = torch.ops.qwen3next.hyper_connection.default
_op_packed = torch.ops.qwen3next.hyper_connection_packed.default


def run(
    streams_: Tensor,
    weights: HyperConnectionWeights,
    eps: float,
    block: Tensor | None,
    injection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    norm, down, up, inject = weights
    first = (streams_, block, injection, norm)
    if isinstance(down, PackedWeight) and isinstance(up, PackedWeight):
        packed = (*parts(down), *parts(up), down.shape[0])
        return _op_packed(*first, *packed, inject, eps)
    return _op(*first, down, up, inject, eps)


@torch.library.register_fake("qwen3next::hyper_connection")
def _(streams_: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor]:
    return _results(streams_, others[-2] is not None)


@torch.library.register_fake("qwen3next::hyper_connection_packed")
def _(streams_: Tensor, *others: Tensor | float | None) -> tuple[Tensor, Tensor]:
    return _results(streams_, others[-2] is not None)


def _results(streams_: Tensor, injects: bool) -> tuple[Tensor, Tensor]:
    T, hc, D = streams_.shape
    injection = streams_.new_empty(T, hc if injects else 0, dtype=torch.float32)
    return streams_.new_empty(T, D), injection
