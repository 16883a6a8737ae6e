"""A Gated DeltaNet layer without its state, which engines keep in their own pages."""

from typing import Any

import torch
from torch import nn

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.model.checkpoint.layouts import output_sizes
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetWeights, shape_of
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.projection import project


class Weight(nn.Module):
    """Holds a `weight`, under the name it has in the checkpoint."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)


class LinearAttention(nn.Module):
    """One rank's projections, convolution, decay and norm; `core` is the engine's.

    Our own parameters have the attribute `weight_loader`, which both hosts call.
    """

    def __init__(
        self,
        config: Qwen3NextConfig,
        layers: HostLayers,
        prefix: str,
        *,
        rank: int,
        layout: Layout = "grouped",  # of the projections
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.shape = shape_of(config, layout)
        self.norm_eps = config.rms_norm_eps
        self.sigmoid_gate = config.sigmoid_gate
        HV = self.shape.num_value_heads
        self.conv1d = Weight(config.conv_dim_per_rank, 1, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.norm = Weight(self.shape.value_dim)
        # Kept for `weights`: looking up module attributes takes 77 us per layer and decode step.
        self._parameter_dicts: tuple[dict[str, Any], ...] = tuple(
            module._parameters for module in (self, self.conv1d, self.norm)
        )

        def shard(parameter: nn.Parameter, *parts: int) -> None:
            def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
                param.data.copy_(shard_channels(loaded, parts, rank, config.tp_size))

            parameter.weight_loader = load  # type: ignore[attr-defined]  # both hosts call it

        shard(self.conv1d.weight, config.key_dim, config.key_dim, config.value_dim)
        shard(self.A_log, config.linear_num_value_heads)
        shard(self.dt_bias, config.linear_num_value_heads)

        self.in_proj_qkvz = _in_projection(config, layers, prefix, "qkvz", layout)
        self.in_proj_ba = _in_projection(config, layers, prefix, "ba", layout)
        self.out_proj = layers.row_parallel(
            config.value_dim, config.hidden_size, bias=False, prefix=f"{prefix}.out_proj"
        )

    def forward(self, x: torch.Tensor | Unnormed, *batch: Any) -> torch.Tensor:
        """Shapes: x [T, D], returns [T, D]."""
        qkvz, ba = project(x, self.in_proj_qkvz, self.in_proj_ba)
        output, _ = self.out_proj(self.core(qkvz, ba, *batch))
        return output

    def core(self, qkvz: torch.Tensor, ba: torch.Tensor, *batch: Any) -> torch.Tensor:
        """What is between the projections, on the step's rows; `batch`: see `DecoderLayer`.

        Shapes:
            qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]
        """
        raise NotImplementedError

    @property
    def weights(self) -> GatedDeltaNetWeights:
        """The parameters as the kernel takes them."""
        own, conv, norm = self._parameter_dicts
        return GatedDeltaNetWeights(
            conv=conv["weight"].squeeze(1),
            A_log=own["A_log"],
            dt_bias=own["dt_bias"],
            norm=norm["weight"],
            norm_eps=self.norm_eps,
            sigmoid_gate=self.sigmoid_gate,
        )


def _in_projection(
    config: Qwen3NextConfig, layers: HostLayers, prefix: str, name: str, layout: Layout
) -> nn.Module:
    """One of the two. A rank's share is a range of the weight (grouped) or of each part (flat)."""
    sizes, prefix = output_sizes(config, name, layout), f"{prefix}.in_proj_{name}"
    if layout == "flat":
        return layers.merged_column_parallel(config.hidden_size, sizes, bias=False, prefix=prefix)
    return layers.column_parallel(config.hidden_size, sizes[0], bias=False, prefix=prefix)


def shard_channels(
    weight: torch.Tensor, parts: tuple[int, ...], rank: int, size: int
) -> torch.Tensor:
    """One rank's share of a weight whose channels are `parts`, such as q, k and v.

    Shapes:
        weight [sum(parts), ...], returns [sum(parts)/size, ...]
    """
    return torch.cat([part.chunk(size)[rank] for part in weight.split(parts)])
