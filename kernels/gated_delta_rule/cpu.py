"""The native gated delta rule."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.gated_delta_rule.arguments import (
    RuleInputs,
    RuleWeights,
    check_arguments,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

native.load()
_op = torch.ops.qwen3next.gated_delta_rule.default


def run(x: RuleInputs, weights: RuleWeights, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op."""
    return _op(*x, *weights, *pool[:5], step.query_start_loc, step.slot, step.context_len)


def bundles(*arguments: Tensor) -> tuple[RuleInputs, RuleWeights, StatePool, Step]:
    """What `run` took, from the arguments of the torch op."""
    x, weights = RuleInputs(*arguments[:5]), RuleWeights(*arguments[5:7])
    state, key, u, g, span, query_start_loc, slot, context_len = arguments[7:]
    unused, T = span, len(x.q)
    pool = StatePool(state, key, u, g, span, conv=unused)
    return x, weights, pool, Step(query_start_loc, slot, context_len, T, T)


@torch.library.register_fake("qwen3next::gated_delta_rule")
def _(*arguments: Tensor) -> Tensor:
    x, weights, pool, step = bundles(*arguments)
    check_arguments(x, weights, pool, step)
    return x.v.new_empty(x.v.shape)
