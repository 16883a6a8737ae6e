"""The trunk of every text model of the family, from SGLang's parallel layers and ours."""

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.cpu.quantisation import use_packing
from qwen3next_plugin.engines.sglang.model.attention import make_attention
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.engines.sglang.model.linear_attention import GatedDeltaNet
from qwen3next_plugin.engines.sglang.model.loading import OurModel
from qwen3next_plugin.engines.sglang.model.moe import SparseMoE
from qwen3next_plugin.engines.sglang.model.vocabulary import (
    make_embedding,
    make_lm_head,
    make_logits_processor,
)
from qwen3next_plugin.model.decoder_layer import DecoderLayer
from qwen3next_plugin.model.moe import SwiGLU
from qwen3next_plugin.model.norm import RMSNorm


def make_decoder_layer(
    config: Qwen3NextConfig,
    quant_config: QuantizationConfig | None,
    prefix: str,
    *,
    layer_id: int,
    layer_type: str,
    is_moe: bool,
) -> DecoderLayer:
    """The neutral decoder layer, from SGLang's parts."""
    mixer: nn.Module
    if layer_type == "linear_attention":
        mixer = GatedDeltaNet(config, quant_config, f"{prefix}.linear_attn", layer_id=layer_id)
    else:
        mixer = make_attention(config, quant_config, f"{prefix}.self_attn", layer_id=layer_id)
    mlp: nn.Module
    if is_moe:
        mlp = SparseMoE(config, quant_config, f"{prefix}.mlp", layer_id=layer_id)
    else:
        layers = host_layers(quant_config)
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, layers, f"{prefix}.mlp")
    return DecoderLayer(config, layer_type=layer_type, mixer=mixer, mlp=mlp)


class Qwen3NextModel(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(
        self, config: Qwen3NextConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.embed_tokens = make_embedding(config)
        self.layers = nn.ModuleList(
            make_decoder_layer(
                config,
                quant_config,
                f"{prefix}.layers.{i}",
                layer_id=i,
                layer_type=layer_type,
                is_moe=config.is_moe_layer(i),
            )
            for i, layer_type in enumerate(config.layer_types)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes: input_ids [T], positions [T], or with images [3, T], returns [T, D]."""
        if input_embeds is None:
            hidden_states = self.embed_tokens(input_ids)
        else:  # a request's own are bf16, whatever the model's dtype
            hidden_states = input_embeds.to(self.embed_tokens.weight.dtype)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, forward_batch)
        return self.norm(hidden_states, residual)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


class Qwen3NextForCausalLM(OurModel):
    """Qwen3-Next as SGLang's registry knows it; replaces the built-in model of that name."""

    model_class: type[Any] = Qwen3NextModel

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self._set_config(config, quant_config)
        self.model = self.model_class(self.config, quant_config, prefix=f"{prefix}model")
        self.lm_head = make_lm_head(self.config, quant_config, self.model.embed_tokens)
        self.logits_processor = make_logits_processor(config)
        use_packing(
            self,
            self.formats,
            self.lm_head,
            head_in_fp32=self.logits_processor.use_fp32_lm_head,
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        """Shapes: input_ids, positions [T]."""
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    # What SGLang asks of a model.

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the drafter shares."""
        return self.model.embed_tokens.weight, self.lm_head.weight


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):  # noqa: N801 (SGLang's name)
    """A dense Qwen3.5, or a later one, as a text model."""


class Qwen3_5MoeForCausalLM(Qwen3NextForCausalLM):  # noqa: N801
    """The same with experts."""


EntryClass = [Qwen3NextForCausalLM, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM]
