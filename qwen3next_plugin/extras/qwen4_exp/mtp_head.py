"""The MTP head of a model whose residual has several streams."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.hyper_connection import HyperConnection, StreamsLayer
from qwen3next_plugin.model.norm import RMSNorm


class StreamsMTPHead(nn.Module):
    """A projection of the embedding and one of each stream, a full-attention layer, a mixer.

    An engine builds embedding, projections and layers, and its subclass has the `forward` that it
    calls.
    """

    def __init__(
        self,
        config: Qwen4ExpConfig,
        prefix: str,
        *,
        embed_tokens: nn.Module,
        fc_embedding: nn.Module,
        fc_hidden: nn.Module,
        layers: Iterable[StreamsLayer],
    ) -> None:
        super().__init__()
        D, self.hc_count, eps = config.hidden_size, config.hc_count, config.rms_norm_eps
        self.embed_tokens = embed_tokens
        self.fc_embedding = fc_embedding
        self.fc_hidden = fc_hidden
        self.layers = nn.ModuleList(layers)
        self.pre_fc_norm_embedding = RMSNorm(D, eps)
        self.pre_fc_norm_hidden = RMSNorm(self.hc_count * D, eps)
        name = f"{prefix}.hyper_connection_mixer"
        self.hyper_connection_mixer = HyperConnection(config, name, injects=False)

    def predict(
        self,
        positions: torch.Tensor,
        embeds: torch.Tensor,
        streams: torch.Tensor,
        *batch: Any,
        layer: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What drafts come from, and the streams for the next draft's pass.

        Args: batch: as of `StreamsLayer.forward`.

        Shapes:
            positions [T] or [3, T], embeds [T, D] of the tokens at positions i+1; streams
            [T, hc·D] at positions i: the trunk's before its last mixer, or for further drafts the
            MTP layer's own; returns [T, D] and [T, hc·D]
        """
        T, D = embeds.shape
        block, _ = self.fc_embedding(self.pre_fc_norm_embedding(embeds))
        hidden, _ = self.fc_hidden(self.pre_fc_norm_hidden(streams).view(T * self.hc_count, D))
        streams_ = hidden.view(T, self.hc_count, D)
        no_tokens = positions  # the layer has no n-grams
        block, injection = self.layers[layer](positions, streams_, block, None, no_tokens, *batch)
        hidden, _ = self.hyper_connection_mixer(streams_, block, injection)
        return hidden, streams_.flatten(1)
