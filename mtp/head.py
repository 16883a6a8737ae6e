"""The MTP head: its input, from the next token and the last hidden state, and its layer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.decoder_layer import DecoderLayer
from qwen3next_plugin.model.norm import RMSNorm

Norm = Callable[[torch.Tensor], torch.Tensor]


def fuse(
    *,
    embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    norm_embedding: Norm,
    norm_hidden: Norm,
    fc: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x = fc([norm_e(embed(t_{i+1})); norm_h(h_i)]), DeepSeek-V3's multi-token prediction input.

    Shapes:
        embeds [T, D] of the tokens at positions i+1
        hidden_states [T, D] at positions i: the trunk's after its final norm, or for further
        drafts the MTP layer's own
        returns [T, D]
    """
    return fc(torch.cat([norm_embedding(embeds), norm_hidden(hidden_states)], dim=-1))


class MTPHead(nn.Module):
    """fc over [embedding; hidden state], a full-attention decoder layer, a norm.

    An engine builds embedding, fc and layers, and its subclass has the `forward` that it calls.
    """

    def __init__(
        self,
        config: Qwen3NextConfig,
        *,
        embed_tokens: nn.Module,
        fc: nn.Module,
        layers: Iterable[DecoderLayer],
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.fc = fc
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_fc_norm_embedding = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _fc(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)[0]

    def predict(
        self,
        positions: torch.Tensor,
        embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        *batch: Any,
        layer: int = 0,
    ) -> torch.Tensor:
        """The hidden states that drafts come from; `batch` as in `DecoderLayer.forward`.

        Shapes:
            positions [T] or [3, T], embeds and hidden_states [T, D], returns [T, D]
        """
        x = fuse(
            embeds=embeds,
            hidden_states=hidden_states,
            norm_embedding=self.pre_fc_norm_embedding,
            norm_hidden=self.pre_fc_norm_hidden,
            fc=self._fc,
        )
        x, residual = self.layers[layer](positions, x, None, *batch)
        return self.norm(x, residual)
