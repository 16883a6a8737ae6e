"""The native convolution."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.causal_conv1d.arguments import ConvInputs, check_arguments
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

native.load()
_op = torch.ops.qwen3next.causal_conv1d.default


def run(x: ConvInputs, weight: Tensor, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op; returns [T, C]."""
    return _op(*x, weight, pool.conv, pool.span, step.query_start_loc, step.slot, step.context_len)


def bundles(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, conv_: Tensor, span: Tensor, *step: Tensor
) -> tuple[ConvInputs, Tensor, StatePool, Step]:
    """What `run` took, from the arguments of the torch op."""
    query_start_loc, slot, context_len = step
    unused, T = span, len(q)
    pool = StatePool(unused, unused, unused, unused, span, conv_)
    return ConvInputs(q, k, v), weight, pool, Step(query_start_loc, slot, context_len, T, T)


@torch.library.register_fake("qwen3next::causal_conv1d")
def _(*arguments: Tensor) -> Tensor:
    x, weight, pool, step = bundles(*arguments)
    check_arguments(x, weight, pool, step)
    return x.q.new_empty(len(x.q), len(weight))
