"""Gated DeltaNet as an SGLang layer: SGLang's projections around the neutral layer."""

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.linear_attention import LinearAttention


class GatedDeltaNet(LinearAttention):
    """One linear-attention layer. SGLang's backend (state/steps.py) has its state pages."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        super().__init__(config, rank=get_parallel().tp_rank)
        self.prefix, self.layer_id = prefix, layer_id
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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        core = get_attn_backend().linear_attn_backend.attend(self, qkvz, ba)
        output, _ = self.out_proj(core)
        return output
