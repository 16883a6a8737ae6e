"""Gated DeltaNet as an SGLang layer: SGLang's projections around the neutral layer."""

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.model_loader.weight_utils import sharded_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import set_weight_attrs
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape, GatedDeltaNetWeights, Weight
from qwen3next_plugin.model.weights import shard_conv_weight


class GatedDeltaNet(nn.Module):
    """One linear-attention layer; its state lies in pages that the backend holds."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.prefix, self.layer_id = prefix, layer_id
        self.shape = GatedDeltaNetShape(
            config.linear_num_key_heads_per_rank,
            config.linear_num_value_heads_per_rank,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        self.norm_eps = config.rms_norm_eps
        # The checkpoint's rows are grouped by key head: a rank's share is one contiguous run.
        self.in_proj_qkvz = ColumnParallelLinear(
            config.hidden_size,
            config.in_proj_qkvz_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_qkvz",
        )
        self.in_proj_ba = ColumnParallelLinear(
            config.hidden_size,
            config.in_proj_ba_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_ba",
        )
        self.out_proj = RowParallelLinear(
            config.value_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self._make_parameters(config)

    def _make_parameters(self, config: Qwen3NextConfig) -> None:
        """The small parameters that no SGLang layer holds, each with its loader."""
        rank, size = get_parallel().tp_rank, get_parallel().tp_size
        dims = (config.key_dim, config.key_dim, config.value_dim)
        HV = self.shape.num_value_heads
        self.conv1d = Weight(sum(dims) // size, 1, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(HV, dtype=torch.float32), requires_grad=False)
        self.norm = Weight(self.shape.value_dim)

        def load_conv(param: nn.Parameter, loaded: torch.Tensor) -> None:
            param.data.copy_(shard_conv_weight(loaded, dims, rank, size))

        set_weight_attrs(self.conv1d.weight, {"weight_loader": load_conv})
        set_weight_attrs(self.A_log, {"weight_loader": sharded_weight_loader(0)})
        set_weight_attrs(self.dt_bias, {"weight_loader": sharded_weight_loader(0)})

    @property
    def weights(self) -> GatedDeltaNetWeights:
        """The parameters as the neutral layer takes them."""
        return GatedDeltaNetWeights(
            conv=self.conv1d.weight.squeeze(1),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm=self.norm.weight,
            norm_eps=self.norm_eps,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        output, _ = self.out_proj(get_attn_backend().linear_attn_backend.attend(self, qkvz, ba))
        return output
