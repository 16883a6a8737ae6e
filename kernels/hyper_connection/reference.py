"""The connection as its equation."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen3next_plugin.kernels.hyper_connection.arguments import HyperConnectionWeights
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight, unpack


def run(
    streams_: Tensor,
    weights: HyperConnectionWeights,
    eps: float,
    block: Tensor | None,
    injection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    (T, hc, _), dtype = streams_.shape, streams_.dtype
    add_block(streams_, block, injection)
    x = normalised(streams_, weights.norm, eps).to(dtype).float()  # [T, hc, D]
    flat = x.flatten(1)
    hidden = silu(flat @ _matrix(weights.down).T / hc).to(dtype).float()  # [T, L]
    gate = (hidden @ _matrix(weights.up).T).sigmoid().view(x.shape)
    mixed = (gate * x).mean(1).to(dtype)
    if weights.inject is None:
        return mixed, x.new_empty(T, 0)
    return mixed, 2 * (flat @ weights.inject.float().T / hc).sigmoid()


def add_block(streams_: Tensor, block: Tensor | None, injection: Tensor | None) -> None:
    """Add a block's output to each stream. Shapes as in the public op."""
    if block is None:
        return
    added = block.float()[:, None]  # [T, 1, D]
    if injection is not None:
        added = injection[:, :, None] * added  # [T, hc, D]
    streams_.copy_(streams_.float() + added)


def normalised(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The zero-centred norm of each stream, in fp32. Shapes: streams [T, hc, D], weight [hc · D]"""
    x = streams.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * (1 + weight.float().view(x.shape[1:]))


def _matrix(weight: Tensor | PackedWeight) -> Tensor:
    return unpack(weight) if isinstance(weight, PackedWeight) else weight.float()
