"""transformers' linear layer on the plugin's kernels and state pages.

With `use_mtp` between its projections; with QWEN3NEXT_BATCH_INVARIANT=1 as the neutral layer.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.transformers.model.host_layers import host_layers
from qwen3next_plugin.engines.transformers.state.cache import PageLayer, RowCache
from qwen3next_plugin.engines.transformers.state.rows import Rows
from qwen3next_plugin.kernels.gated_delta_net import GatedDeltaNetWeights
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape, attend
from qwen3next_plugin.model.linear_attention import LinearAttention


@cache
def on_pages(host: type[nn.Module]) -> type[nn.Module]:
    """The host's layer class, which runs on state pages if the cache is a `RowCache`."""

    class GatedDeltaNet(host):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            for value in (*args, *kwargs.values()):
                if isinstance(value, RowCache):
                    return run(self, hidden_states, value.layers[self.layer_idx])
            return super().forward(hidden_states, *args, **kwargs)

    return GatedDeltaNet


@force_accelerate_hooks(["conv1d", "norm"])  # modules that are not called may be offloaded
def run(layer: Any, hidden_states: Tensor, page: PageLayer) -> Tensor:
    """One step of the host's layer. Shapes: hidden_states [B, n, D], returns the same"""
    x, flat = hidden_states.flatten(0, 1), hasattr(layer, "in_proj_qkv")
    if flat:
        qkvz = torch.cat([layer.in_proj_qkv(x), layer.in_proj_z(x)], dim=-1)
        ba = torch.cat([layer.in_proj_b(x), layer.in_proj_a(x)], dim=-1)
    else:
        qkvz, ba = layer.in_proj_qkvz(x), layer.in_proj_ba(x)
    shape = GatedDeltaNetShape(
        num_key_heads=layer.num_k_heads,
        num_value_heads=layer.num_v_heads,
        key_dim=layer.head_k_dim,
        value_dim=layer.head_v_dim,
        layout="flat" if flat else "grouped",
    )
    weights = GatedDeltaNetWeights(
        conv=layer.conv1d.weight.squeeze(1),
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        norm=layer.norm.weight,
        norm_eps=layer.layer_norm_epsilon,
        sigmoid_gate=layer.norm.activation == "sigmoid",
    )
    out = attend(
        qkvz=qkvz,
        ba=ba,
        weights=weights,
        shape=shape,
        pool_=page.pool_for(shape, qkvz, len(page.step.columns)),
        step=page.step.linear_on(qkvz.device),
    )
    return layer.out_proj(out.view(*hidden_states.shape[:2], -1))


class OnRows(LinearAttention):
    """The neutral layer, from the host's projections."""

    def __init__(self, config: Qwen3NextConfig, of_host: nn.Module, index: int) -> None:
        layers = host_layers(of_host)
        super().__init__(config, layers, "linear_attn", rank=0, layout=config.layout)
        self.index = index

    def core(self, qkvz: Tensor, ba: Tensor, *batch: Any) -> Tensor:
        """Shapes: qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]"""
        rows: Rows = batch[0]
        cache: RowCache = batch[1]
        page, N = cache.layers[self.index], len(rows.seq_lens)
        return attend(
            qkvz=qkvz,
            ba=ba,
            weights=self.weights,
            shape=self.shape,
            pool_=page.pool_for(self.shape, qkvz, N),
            step=rows.step,
        )
