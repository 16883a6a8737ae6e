"""The MTP head, made of the host's layers, under the names of the checkpoint."""

import copy
from typing import Any

from torch import Tensor, nn

from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.steps import BatchStep
from qwen3next_plugin.mtp.head import fuse


class MultiTokenPredictor(nn.Module):
    """`mtp.*` of a checkpoint: predicts the token after the next. Embedding and head are shared."""

    def __init__(self, config: Any, *, layer: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * D, D, bias=False)
        self.pre_fc_norm_embedding = norm(D, eps)
        self.pre_fc_norm_hidden = norm(D, eps)
        self.norm = norm(D, eps)
        self.layers = nn.ModuleList([layer(layer_config(config), 0)])
        attention: Any = self.layers[0].self_attn
        attention.config = config  # it says which attention runs, and may change
        attention.layer_idx = config.num_hidden_layers  # in the cache, behind the trunk's

    def forward(
        self,
        embeds: Tensor,
        hidden_states: Tensor,
        *,
        rotary: nn.Module,
        step: BatchStep,
        cache: RowCache,
    ) -> tuple[Tensor, Tensor]:
        """The MTP layer's hidden states, twice: input of the head, and of the next draft.

        Shapes: embeds [B, n, D] of the tokens behind the step's; hidden_states [B, n, D] of the
            step's; returns [B, n, D]
        """
        x = fuse(
            embeds=embeds,
            hidden_states=hidden_states,
            norm_embedding=self.pre_fc_norm_embedding,
            norm_hidden=self.pre_fc_norm_hidden,
            fc=self.fc,
        )
        cache.begin_mtp(step)
        positions = step.positions
        if hasattr(rotary, "mrope_section"):  # Qwen3.5's, which has three axes
            positions = positions.expand(3, -1, -1)
        x = self.layers[0](
            x,
            position_embeddings=rotary(x, positions),
            attention_mask=step.attend,
            **{CACHE: cache},
        )
        x = self.norm(x)
        return x, x


def layer_config(config: Any) -> Any:
    """The config of the MTP layer: full attention, with experts where the model has any."""
    config = copy.deepcopy(config)
    config.layer_types = ["full_attention", *config.layer_types[1:]]
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = [], 1
    return config
