"""Qwen4-Exp's MTP head, driven by our drafter."""

import torch
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.utils import PPMissingLayer

from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.mtp import Qwen3NextMTP
from qwen3next_plugin.engines.vllm.model.streams import make_streams_layer
from qwen3next_plugin.engines.vllm.model.vocabulary import make_embedding
from qwen3next_plugin.mtp.streams_head import StreamsMTPHead


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0}
)
class StreamsPredictor(StreamsMTPHead):
    """The neutral head, from vLLM's parts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = read_config(vllm_config)
        # vLLM puts the trunk's embedding here, unless it is on another pipeline stage.
        alone = get_pp_group().world_size == 1
        embed_tokens = PPMissingLayer() if alone else make_embedding(config)
        layers, D = host_layers(vllm_config), config.hidden_size
        super().__init__(
            config,
            embed_tokens=embed_tokens,
            fc_embedding=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_embedding"),
            fc_hidden=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_hidden"),
            layers=(
                make_streams_layer(config, vllm_config, f"{prefix}.layers.{i}", i=None)
                for i in range(config.num_nextn_predict_layers)
            ),
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shapes: input_ids [T], returns [T, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: input_ids, positions [T], hidden_states [T, hc·D], returns [T, D], [T, hc·D]."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        layer = spec_step_idx % len(self.layers)
        return self.predict(positions, embeds, hidden_states, layer=layer)


class Qwen4ExpMTP(Qwen3NextMTP):
    """The drafter as vLLM's registry knows it; its `forward` returns a pair."""

    predictor_class = StreamsPredictor
