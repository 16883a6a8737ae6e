"""Gated DeltaNet around the pages of SGLang's backend."""

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
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
        super().__init__(config, host_layers(quant_config), prefix, rank=get_parallel().tp_rank)
        self.layer_id = layer_id

    def core(self, qkvz: torch.Tensor, ba: torch.Tensor, *batch: Any) -> torch.Tensor:
        """Shapes: qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]."""
        return get_attn_backend().linear_attn_backend.attend(self, qkvz, ba)
