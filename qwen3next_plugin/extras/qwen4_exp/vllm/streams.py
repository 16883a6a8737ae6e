"""Qwen4-Exp's text model (Qwen3.8-Flash-Next), on a CPU: the trunk with several streams."""

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import (
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
)

from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.model.attention import make_attention
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.linear_attention import GatedDeltaNet
from qwen3next_plugin.engines.vllm.model.moe import SparseMoE
from qwen3next_plugin.engines.vllm.model.trunk import Qwen3_5ForCausalLM
from qwen3next_plugin.engines.vllm.model.vocabulary import make_embedding
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig, of_kind
from qwen3next_plugin.extras.qwen4_exp.hyper_connection import (
    HyperConnection,
    StreamsLayer,
    no_streams,
)
from qwen3next_plugin.extras.qwen4_exp.indexed_attention import IndexedAttention
from qwen3next_plugin.extras.qwen4_exp.vllm.indexed_attention import IndexedLayer
from qwen3next_plugin.extras.qwen4_exp.vllm.ple import NgramLayer
from qwen3next_plugin.model.attention import GatedAttention
from qwen3next_plugin.model.checkpoint.layouts import SHARD


def make_indexed_attention(
    config: Qwen4ExpConfig, vllm_config: VllmConfig, prefix: str
) -> GatedAttention:
    """The neutral layer, from vLLM's parts; without an indexer, that of the other models."""
    if not config.indexer_n_heads:
        return make_attention(config, vllm_config, prefix)
    attn = IndexedLayer(config, vllm_config, f"{prefix}.attn")
    return IndexedAttention(config, host_layers(vllm_config), prefix, attn=attn)


def make_streams_layer(
    config: Qwen4ExpConfig, vllm_config: VllmConfig, prefix: str, *, i: int | None
) -> StreamsLayer:
    """Layer `i` of the trunk, or the MTP head's, from vLLM's parts."""
    mlp = SparseMoE(config, vllm_config, f"{prefix}.mlp")
    layer_type = "full_attention" if i is None else config.layer_types[i]
    if layer_type == "full_attention":
        mixer = make_indexed_attention(config, vllm_config, f"{prefix}.self_attn")
        return StreamsLayer(config, prefix, layer_type=layer_type, mixer=mixer, mlp=mlp)
    assert i is not None
    ngrams, ple = config.has_ngrams(i), None
    linear = GatedDeltaNet(config, vllm_config, f"{prefix}.linear_attn", shared=ngrams)
    if ngrams:
        ple = NgramLayer(config, vllm_config, f"{prefix}.ple", i=i, linear=linear)
    return StreamsLayer(config, prefix, layer_type=layer_type, mixer=linear, mlp=mlp, ple=ple)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class Qwen4ExpModel(nn.Module):
    """Embedding, layers, and the mixer of the last one's streams; on one pipeline stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = of_kind(read_config(vllm_config))
        self.hc_count = config.hc_count
        self.embed_tokens = make_embedding(config)

        def make_layer(prefix: str) -> StreamsLayer:
            index = extract_layer_index(prefix)
            return make_streams_layer(config, vllm_config, prefix, i=index)

        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, make_layer, prefix=f"{prefix}.layers"
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )
        name = f"{prefix}.hyper_connection_mixer"
        self.hyper_connection_mixer = HyperConnection(config, name, injects=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shapes: input_ids [T], returns [T, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads, and the streams, which the MTP head reads.

        Shapes:
            input_ids, positions [T], returns [T, D] and [T, hc·D]
        """
        block = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        streams_, injection = no_streams(block, self.hc_count), None
        for layer in self.layers:
            block, injection = layer(positions, streams_, block, injection, input_ids)
        hidden_states, _ = self.hyper_connection_mixer(streams_, block, injection)
        return hidden_states, streams_.flatten(1)


class Qwen4ExpForCausalLM(Qwen3_5ForCausalLM):
    """The trunk as vLLM's registry knows it; also of a model with a vision tower, for texts."""

    model_class = Qwen4ExpModel
    requires_raw_input_tokens = True  # n-grams are of tokens
    streams: torch.Tensor | None = None  # of the last step

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes: input_ids, positions [T], returns [T, D]."""
        hidden_states, self.streams = self.model(input_ids, positions, inputs_embeds)
        return hidden_states

    @property
    def fixed(self) -> str | None:
        """Why other weights are refused."""
        if of_kind(self.config).ple_layer_ids:
            return "the table of n-grams stays that of the model: restart the server"
        return None

    def get_mtp_target_hidden_states(self) -> torch.Tensor | None:
        """What vLLM gives the drafter in place of hidden states. Shapes: returns [T, hc·D]"""
        return self.streams

    @staticmethod
    def is_unused_checkpoint_weight(name: str) -> bool:
        """Whether vLLM shall not read a tensor: a table of n-grams stays in its file."""
        return SHARD.search(name) is not None
