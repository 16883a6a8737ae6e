"""The layer as its three references, one after the other."""

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d import reference as causal_conv1d
from qwen3next_plugin.kernels.causal_conv1d.arguments import ConvInputs
from qwen3next_plugin.kernels.gated_delta_net.arguments import (
    GatedDeltaNetWeights,
    Projections,
    checked_heads,
)
from qwen3next_plugin.kernels.gated_delta_rule import reference as gated_delta_rule
from qwen3next_plugin.kernels.gated_delta_rule.arguments import RuleInputs, RuleWeights
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.rms_norm_gated import reference as rms_norm_gated
from qwen3next_plugin.kernels.step import Step


def run(
    x: Projections, weights: GatedDeltaNetWeights, pool: StatePool, step: Step, out_: Tensor
) -> None:
    """Shapes as in the public op."""
    q, k, v, z, b, a = checked_heads(x, weights, pool, step, out_)
    (T, H, K), (_, _, R, V) = q.shape, v.shape
    inputs = ConvInputs(q, k, v.flatten(2))
    out = causal_conv1d.run(inputs, weights.conv, pool, step)
    q, k, v = out.split([H * K, H * K, H * R * V], dim=-1)
    rule = RuleInputs(q.view(T, H, K), k.view(T, H, K), v.view(T, H * R, V), a, b)
    out = gated_delta_rule.run(rule, RuleWeights(weights.A_log, weights.dt_bias), pool, step)
    norm = (weights.norm, weights.norm_eps, weights.sigmoid_gate)
    out_.copy_(rms_norm_gated.run(out.view(z.shape), z, *norm))
