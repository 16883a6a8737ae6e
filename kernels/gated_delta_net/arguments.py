"""What a backend of the layer takes, and the checks of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.causal_conv1d.arguments import WIDTH, check_convolution
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, check, check_contiguous
from qwen3next_plugin.kernels.gated_delta_rule import arguments as rule
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID, Step


@dataclass(frozen=True, slots=True)
class GatedDeltaNetShape:
    """Head counts and dims of one rank's share of the layer."""

    num_key_heads: int  # H
    num_value_heads: int  # HV
    key_dim: int  # K
    value_dim: int  # V
    layout: Literal["grouped", "flat"] = "grouped"  # of the columns of qkvz and ba

    @property
    def values_per_key(self) -> int:
        """R, the value heads that share a key head."""
        return self.num_value_heads // self.num_key_heads


class Heads(NamedTuple):
    """What the projections hold. Shapes: q, k [T, H, K]; v, z [T, H, R, V]; b, a [T, H, R]"""

    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


class Projections(NamedTuple):
    """The output of the layer's two input projections.

    Grouped, each key head has [q | k | R values | R gates] and [R b | R a]. Flat, all heads' q come
    first, then all heads' k, and so on.

    Shapes: qkvz [T, H·(2K + 2R·V)], ba [T, H·2R]; any strides but the last
    """

    qkvz: Tensor
    ba: Tensor
    shape: GatedDeltaNetShape

    def heads(self) -> Heads:
        """Views of the parts. The native op makes them itself: an operator each costs it time."""
        s, T = self.shape, len(self.qkvz)
        H, K, V, R = s.num_key_heads, s.key_dim, s.value_dim, s.values_per_key
        if s.layout == "flat":
            q, k, v, z = self.qkvz.split([H * K, H * K, H * R * V, H * R * V], dim=-1)
            b, a = self.ba.unflatten(-1, (2, H, R)).unbind(1)
            q, k = q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K))
        else:
            width = 2 * K + 2 * R * V
            q, k, v, z = self.qkvz.unflatten(-1, (H, width)).split([K, K, R * V, R * V], dim=-1)
            b, a = self.ba.unflatten(-1, (H, 2 * R)).split([R, R], dim=-1)
        values = (T, H, R, V)
        return Heads(q, k, v.view(values), z.view(values), b, a)


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


def checked_heads(
    x: Projections, weights: GatedDeltaNetWeights, pool: StatePool, step: Step, out_: Tensor
) -> Heads:
    """What the projections hold.

    Raises: ValueError unless the shapes, dtypes, devices and strides are the public op's.
    """
    op, s, T = "gated_delta_net", x.shape, len(x.qkvz)
    H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
    if H == 0 or HV % H:
        raise ValueError(f"{op}: cannot serve {H} key heads with {HV} value heads")
    dtype, device = x.qkvz.dtype, x.qkvz.device
    check(op, "qkvz", x.qkvz, (T, 2 * (H * K + HV * V)), ACTIVATIONS, device)
    check(op, "ba", x.ba, (T, 2 * HV), (dtype,), device)
    check(op, "norm", weights.norm, (V,), (dtype, *FLOAT), device)
    check(op, "out_", out_, (T, HV * V), (dtype,), device)
    check_contiguous(op, "out_", out_)
    heads = x.heads()
    v = heads.v[:, 0, :1].expand(-1, HV, -1)  # of v's shape; flattened, grouped v is copied
    inputs = rule.RuleInputs(heads.q, heads.k, v, heads.a, heads.b)
    rule.check_arguments(inputs, rule.RuleWeights(weights.A_log, weights.dt_bias), pool, step)
    check_convolution(heads.q, 2 * H * K + HV * V, weights.conv, pool)
    inputs_back, tokens_back = pool.conv.shape[1] - WIDTH, pool.key.shape[1] - GRID
    if inputs_back != tokens_back:
        raise ValueError(f"{op}: conv_ rolls back {inputs_back} tokens, key_ {tokens_back}")
    return heads
