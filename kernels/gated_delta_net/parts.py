"""The layer as its three ops, one after the other, on whichever backend they are of."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from qwen3next_plugin.kernels.gated_delta_net import GatedDeltaNetWeights, Projections


def in_parts(causal_conv1d: Callable, gated_delta_rule: Callable, rms_norm_gated: Callable):
    """The layer made of these three."""

    def gated_delta_net(
        x: "Projections",
        weights: "GatedDeltaNetWeights",
        state_: Tensor,
        key_: Tensor,
        u_: Tensor,
        g_: Tensor,
        span_: Tensor,
        conv_: Tensor,
        query_start_loc: Tensor,
        slot: Tensor,
        context_len: Tensor,
        max_query_len: int,
        out_: Tensor,
    ) -> None:
        """Shapes as in the public op."""
        (T, H, K), (_, _, R, V) = x.q.shape, x.v.shape
        rows = (query_start_loc, slot, context_len)
        out = causal_conv1d(x.q, x.k, x.v.flatten(2), weights.conv, conv_, span_, *rows)
        q, k, v = out.split([H * K, H * K, H * R * V], dim=-1)
        out = gated_delta_rule(
            q.view(T, H, K), k.view(T, H, K), v.view(T, H * R, V), x.a, x.b,
            weights.A_log, weights.dt_bias, state_, key_, u_, g_, span_, *rows,
        )  # fmt: skip
        out_.copy_(rms_norm_gated(out.view(x.z.shape), x.z, weights.norm, weights.norm_eps))

    return gated_delta_net
