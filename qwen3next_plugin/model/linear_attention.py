"""The parameters of a Gated DeltaNet layer that are not projections; both engines build on them."""

import torch
from torch import nn

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape, GatedDeltaNetWeights
from qwen3next_plugin.model.weights import shard_rows


class Weight(nn.Module):
    """Holds a `weight`, under the name it has in the checkpoint."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)


class LinearAttention(nn.Module):
    """One rank's convolution, decay and norm parameters, each with the loader engines look for.

    `layout` is that of the projections, which the engine adds.
    """

    def __init__(self, config: Qwen3NextConfig, *, rank: int, layout: Layout = "grouped") -> None:
        super().__init__()
        self.shape = GatedDeltaNetShape.from_config(config, layout)
        self.norm_eps = config.rms_norm_eps
        HV = self.shape.num_value_heads
        self.conv1d = Weight(config.conv_dim_per_rank, 1, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.norm = Weight(self.shape.value_dim)

        def shard(parameter: nn.Parameter, *parts: int) -> None:
            def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
                param.data.copy_(shard_rows(loaded, parts, rank, config.tp_size))

            parameter.weight_loader = load  # type: ignore[attr-defined]  # both hosts call it

        shard(self.conv1d.weight, config.key_dim, config.key_dim, config.value_dim)
        shard(self.A_log, config.linear_num_value_heads)
        shard(self.dt_bias, config.linear_num_value_heads)

    @property
    def weights(self) -> GatedDeltaNetWeights:
        """The parameters as the kernel takes them."""
        return GatedDeltaNetWeights(
            conv=self.conv1d.weight.squeeze(1),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm=self.norm.weight,
            norm_eps=self.norm_eps,
        )
