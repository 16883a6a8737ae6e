"""Qwen4-Exp's MTP head, made of the host's layers, under the names of the checkpoint."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.steps import BatchStep


class StreamsPredictor(nn.Module):
    """A projection of the embedding and one of each stream, an indexed layer, a mixer."""

    def __init__(self, config: Any, *, layer: type[nn.Module], mixer: type[nn.Module]) -> None:
        super().__init__()
        D, self.hc_count = config.hidden_size, config.hc_count
        self.fc_embedding = nn.Linear(D, D, bias=False)
        self.fc_hidden = nn.Linear(D, D, bias=False)
        self.layers = nn.ModuleList([layer(layer_config(config), 0)])
        self.hyper_connection_mixer = mixer(config, use_combine=False)
        attention: Any = self.layers[0].self_attn
        norm: Any = type(attention.q_norm)
        self.pre_fc_norm_embedding = norm(D, eps=config.rms_norm_eps)
        self.pre_fc_norm_hidden = norm(self.hc_count * D, eps=config.rms_norm_eps)
        attention.config = config  # it says which attention runs, and may change
        for part in (attention, attention.indexer):
            part.layer_idx = config.num_hidden_layers  # in the cache, behind the trunk's

    def forward(
        self,
        embeds: Tensor,
        streams: Tensor,
        *,
        rotary: nn.Module,
        step: BatchStep,
        cache: RowCache,
    ) -> tuple[Tensor, Tensor]:
        """What the output head reads, and the streams for the next draft.

        Shapes: embeds [B, n, D] of the tokens behind the step's; streams [B, n, hc·D] of the
            step's; returns [B, n, D] and [B, n, hc·D]
        """
        embedded = self.fc_embedding(self.pre_fc_norm_embedding(embeds))
        hidden = self.pre_fc_norm_hidden(streams).unflatten(-1, (self.hc_count, -1))
        x = (self.fc_hidden(hidden) + embedded[..., None, :]).flatten(-2)  # [B, n, hc·D]
        cache.begin_mtp(step)
        assert step.so_far is not None
        positions = torch.cat([step.so_far, step.positions], dim=1)  # keys', then queries'
        out = self.layers[0](
            x,
            position_embeddings=rotary(x, positions.expand(3, -1, -1)),
            attention_mask=step.attend,
            **{CACHE: cache},
        )
        return self.hyper_connection_mixer(out), out


def layer_config(config: Any) -> Any:
    """The config of the MTP layer: attention with an indexer, no n-grams."""
    config = copy.deepcopy(config)
    config.layer_types = ["indexed_attention", *config.layer_types[1:]]
    config.ple_layer_ids = []
    return config
