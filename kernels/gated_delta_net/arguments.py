"""What a backend of the layer takes, and the checks of it."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import check_convolution
from qwen3next_plugin.kernels.checks import FLOAT, check, check_contiguous
from qwen3next_plugin.kernels.gated_delta_rule import arguments as rule
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


class Projections(NamedTuple):
    """The output of the layer's two input projections.

    Shapes: q, k [T, H, K]; v, z [T, H, R, V]; b, a [T, H, R]; any strides but the last, and that of
        v's heads R
    """

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class GatedDeltaNetWeights(NamedTuple):
    """The layer's parameters besides its projections.

    Shapes: conv [C, 4], C = H * (2 * K + R * V); A_log, dt_bias [HV]; norm [V]
    """

    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    norm_eps: float
    sigmoid_gate: bool = False  # instead of silu, of the norm


def check_norm(x: Projections, weights: GatedDeltaNetWeights, out_: Tensor) -> None:
    """Check the gated norm's arguments. On a CPU the native ops check all others."""
    op, q, v = "gated_delta_net", x.q, x.v
    T, H, R, V = v.shape
    check(op, "z", x.z, (T, H, R, V), (q.dtype,), q.device)
    check(op, "norm", weights.norm, (V,), (q.dtype, *FLOAT), q.device)
    check(op, "out_", out_, (len(q), H * R * V), (q.dtype,), q.device)
    check_contiguous(op, "out_", out_)


def check_arguments(
    x: Projections, weights: GatedDeltaNetWeights, pool: StatePool, step: Step
) -> None:
    """Check all but the norm's arguments, each once."""
    (T, H, K), (R, V) = x.q.shape, x.v.shape[2:]
    check("gated_delta_net", "v", x.v, (T, H, R, V), (x.q.dtype,), x.q.device)
    inputs = rule.RuleInputs(x.q, x.k, x.v.flatten(1, 2), x.a, x.b)
    rule.check_arguments(inputs, rule.RuleWeights(weights.A_log, weights.dt_bias), pool, step)
    check_convolution(x.q, H * (2 * K + R * V), weights.conv, pool)
