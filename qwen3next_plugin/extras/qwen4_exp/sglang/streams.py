"""Qwen4-Exp's text model (Qwen3.8-Flash-Next), on a CPU: the trunk with several streams."""

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from qwen3next_plugin.engines.sglang.model.attention import make_attention
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.engines.sglang.model.linear_attention import GatedDeltaNet
from qwen3next_plugin.engines.sglang.model.moe import SparseMoE
from qwen3next_plugin.engines.sglang.model.trunk import Qwen3NextForCausalLM
from qwen3next_plugin.engines.sglang.model.vocabulary import make_embedding
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.hyper_connection import (
    HyperConnection,
    StreamsLayer,
    no_streams,
)
from qwen3next_plugin.extras.qwen4_exp.indexed_attention import IndexedAttention
from qwen3next_plugin.extras.qwen4_exp.sglang.indexed_attention import IndexedLayer
from qwen3next_plugin.extras.qwen4_exp.sglang.ple import NgramLayer
from qwen3next_plugin.model.attention import GatedAttention

FIXED = "weights of a model with several streams are not updated: restart"


def make_indexed_attention(
    config: Qwen4ExpConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
    *,
    layer_id: int,
) -> GatedAttention:
    """The neutral layer, from SGLang's parts; without an indexer, that of the other models."""
    if not config.indexer_n_heads:
        return make_attention(config, quant_config, prefix, layer_id=layer_id)
    attn = IndexedLayer(config, quant_config, f"{prefix}.attn", layer_id=layer_id)
    return IndexedAttention(config, host_layers(quant_config), prefix, attn=attn)


def make_streams_layer(
    config: Qwen4ExpConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
    *,
    layer_id: int,
    layer_type: str,
) -> StreamsLayer:
    """A layer of the trunk, or the MTP head's, from SGLang's parts."""
    mlp = SparseMoE(config, quant_config, f"{prefix}.mlp", layer_id=layer_id)
    mixer: nn.Module
    ple = None
    if layer_type == "linear_attention":
        mixer = GatedDeltaNet(config, quant_config, f"{prefix}.linear_attn", layer_id=layer_id)
        if config.has_ngrams(layer_id):
            ple = NgramLayer(config, quant_config, f"{prefix}.ple", layer_id=layer_id)
    else:
        name = f"{prefix}.self_attn"
        mixer = make_indexed_attention(config, quant_config, name, layer_id=layer_id)
    return StreamsLayer(config, prefix, layer_type=layer_type, mixer=mixer, mlp=mlp, ple=ple)


class Qwen4ExpModel(nn.Module):
    """Embedding, layers, and the mixer of the last one's streams."""

    def __init__(
        self, config: Qwen4ExpConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.hc_count = config.hc_count
        self.embed_tokens = make_embedding(config)
        self.layers = nn.ModuleList(
            make_streams_layer(
                config, quant_config, f"{prefix}.layers.{i}", layer_id=i, layer_type=layer_type
            )
            for i, layer_type in enumerate(config.layer_types)
        )
        name = f"{prefix}.hyper_connection_mixer"
        self.hyper_connection_mixer = HyperConnection(config, name, injects=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads, and the streams, which the MTP head reads.

        Shapes: input_ids, positions [T], returns [T, D] and [T, hc·D]
        """
        if input_embeds is None:
            block = self.embed_tokens(input_ids)
        else:
            block = input_embeds.to(self.embed_tokens.weight.dtype)
        streams_, injection = no_streams(block, self.hc_count), None
        for layer in self.layers:
            block, injection = layer(
                positions, streams_, block, injection, input_ids, forward_batch
            )
        hidden_states, _ = self.hyper_connection_mixer(streams_, block, injection)
        return hidden_states, streams_.flatten(1)


class Qwen4ExpForCausalLM(Qwen3NextForCausalLM):
    """The trunk as SGLang's registry knows it; also of a model with a vision tower, for texts."""

    model_class = Qwen4ExpModel
    fixed = FIXED

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        """Shapes: input_ids, positions [T]."""
        hidden_states, streams = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(
            input_ids,
            hidden_states,
            self.lm_head,
            forward_batch,
            hidden_states_before_norm=streams,  # SGLang's name of what a drafter reads
        )


EntryClass = Qwen4ExpForCausalLM
