"""The layer as its three ops, one after the other, in one backend."""

from collections.abc import Callable

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import ConvInputs
from qwen3next_plugin.kernels.gated_delta_net.arguments import GatedDeltaNetWeights, Projections
from qwen3next_plugin.kernels.gated_delta_rule.arguments import RuleInputs, RuleWeights
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


def in_parts(causal_conv1d: Callable, gated_delta_rule: Callable, rms_norm_gated: Callable):
    """The layer made of these three."""

    def run(
        x: Projections,
        weights: GatedDeltaNetWeights,
        pool: StatePool,
        step: Step,
        out_: Tensor,
    ) -> None:
        """Shapes as in the public op."""
        (T, H, K), (_, _, R, V) = x.q.shape, x.v.shape
        out = causal_conv1d(ConvInputs(x.q, x.k, x.v.flatten(2)), weights.conv, pool, step)
        q, k, v = out.split([H * K, H * K, H * R * V], dim=-1)
        inputs = RuleInputs(q.view(T, H, K), k.view(T, H, K), v.view(T, H * R, V), x.a, x.b)
        out = gated_delta_rule(inputs, RuleWeights(weights.A_log, weights.dt_bias), pool, step)
        out_.copy_(rms_norm_gated(out.view(x.z.shape), x.z, weights.norm, weights.norm_eps))

    return run
