"""The native layer, as one op."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.gated_delta_net.arguments import GatedDeltaNetWeights, Projections
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step

native.load()
_op = torch.ops.qwen3next.gated_delta_net.default


def run(
    x: Projections, weights: GatedDeltaNetWeights, pool: StatePool, step: Step, out_: Tensor
) -> None:
    """Shapes as in the public op."""
    s = x.shape
    sizes = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim, s.layout == "flat"
    rows = step.query_start_loc, step.slot, step.context_len
    _op(x.qkvz, x.ba, *sizes, *weights, *pool, *rows, out_)


@torch.library.register_fake("qwen3next::gated_delta_net")
def _(*arguments: Tensor | float) -> None:
    return None
