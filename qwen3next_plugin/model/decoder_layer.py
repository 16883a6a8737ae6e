"""One decoder layer of the trunk or the MTP head, from a mixer and an MLP that an engine builds."""

from typing import Any

import torch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.model.norm import RMSNorm


class Blocks(nn.Module):
    """The mixer and the MLP of a decoder layer, by their names in checkpoints."""

    def __init__(self, *, layer_type: str, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.is_linear = layer_type == "linear_attention"
        if self.is_linear:
            self.linear_attn = mixer
        else:
            self.self_attn = mixer
        self.mlp = mlp

    def mix(self, positions: torch.Tensor, x: torch.Tensor | Unnormed, *batch: Any) -> torch.Tensor:
        """Run the mixer on x, or on its norm; `batch`: the engine's further arguments for it.

        Shapes: positions [T], x [T, D], returns [T, D]
        """
        if self.is_linear:
            return self.linear_attn(x, *batch)
        return self.self_attn(positions, x, *batch)


class DecoderLayer(Blocks):
    """Norm, mixer, norm, MLP. The residual is a separate tensor, updated in place."""

    def __init__(
        self, config: Qwen3NextConfig, *, layer_type: str, mixer: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__(layer_type=layer_type, mixer=mixer, mlp=mlp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        *batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer; `batch` as in `mix`.

        Shapes:
            positions [T], hidden_states and residual [T, D], returns both
        """
        unnormed = self.input_layernorm.before(hidden_states, residual)
        residual = hidden_states if residual is None else residual  # of the first layer
        hidden_states = self.mix(positions, unnormed, *batch)
        return self.mlp(self.post_attention_layernorm.before(hidden_states, residual)), residual
