"""The text models of the family: the trunk, from vLLM's parallel layers and ours.

vLLM builds one by its registry, fills it by `load_weights`, and each step calls `forward` and
`compute_logits`.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.vllm.cpu.quantisation import (
    own_rank,
    use_packing,
    with_quantisation,
)
from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.model.attention import make_attention
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.hybrid import HybridModel
from qwen3next_plugin.engines.vllm.model.linear_attention import GatedDeltaNet
from qwen3next_plugin.engines.vllm.model.loading import (
    FLAT_MODULES,
    LANGUAGE_MODEL,
    PACKED_MODULES,
    load,
    projection_layout,
)
from qwen3next_plugin.engines.vllm.model.moe import SparseMoE, describe_experts
from qwen3next_plugin.engines.vllm.model.vocabulary import make_embedding, make_lm_head
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.state.pages import largest_page
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import loaded_tensors, not_loaded_tensors
from qwen3next_plugin.model.decoder_layer import DecoderLayer
from qwen3next_plugin.model.moe import SwiGLU
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.quantisation.layers import attacher
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packing import Packer

logger = init_logger(LOGGER)


def make_decoder_layer(
    config: Qwen3NextConfig,
    vllm_config: VllmConfig,
    prefix: str,
    *,
    layer_type: str,
    is_moe: bool,
) -> DecoderLayer:
    """The neutral decoder layer, from vLLM's parts."""
    mixer: nn.Module
    if layer_type == "linear_attention":
        mixer = GatedDeltaNet(config, vllm_config, f"{prefix}.linear_attn")
    else:
        mixer = make_attention(config, vllm_config, f"{prefix}.self_attn")
    mlp: nn.Module
    if is_moe:
        mlp = SparseMoE(config, vllm_config, f"{prefix}.mlp")
    else:
        layers = host_layers(vllm_config)
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, layers, f"{prefix}.mlp")
    return DecoderLayer(config, layer_type=layer_type, mixer=mixer, mlp=mlp)


# Positions are [T], or [3, T] of a model that reads images.
@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class Qwen3NextModel(nn.Module):
    """Embedding, this stage's layers, and the final norm on the last stage."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = read_config(vllm_config)
        self.embed_tokens = make_embedding(config)

        def make_layer(prefix: str) -> DecoderLayer:
            index = extract_layer_index(prefix)
            return make_decoder_layer(
                config,
                vllm_config,
                prefix,
                layer_type=config.layer_types[index],
                is_moe=config.is_moe_layer(index),
            )

        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers, make_layer, prefix=f"{prefix}.layers"
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        self.norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps)
            if get_pp_group().is_last_rank
            else PPMissingLayer()
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shapes: input_ids [T], returns [T, D]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run this stage.

        Shapes:
            input_ids [T], positions [T] or [3, T], returns [T, D] on the last stage
        """
        if intermediate_tensors is None:
            hidden_states = (
                self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            )
            residual = None
        else:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        return self.norm(hidden_states, residual)


class Qwen3NextForCausalLM(nn.Module, HybridModel, SupportsLoRA, SupportsPP):
    """The trunk as vLLM's registry knows it; replaces the built-in model of that name."""

    packed_modules_mapping = PACKED_MODULES
    model_class: type[Any] = Qwen3NextModel
    fall_back_to_pt_during_load = False  # safetensors only: nothing is unpickled

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        vllm_config = with_quantisation(vllm_config)
        self.config = read_config(vllm_config)
        self.quantised = vllm_config.quant_config is not None
        self.formats = served_formats(vllm_config.quant_config)
        self.layout = projection_layout(self.config, vllm_config)
        dispatch.load(current_platform.device_type)
        layout = largest_page(self.config, vllm_config)
        extras.before_load("vllm", self.config, layout, torch.get_default_device(), logger.info)
        self.model = self.model_class(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = make_lm_head(
            self.config, vllm_config, prefix, embedding=self.model.embed_tokens
        )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        describe_experts(self, self.model.layers)
        use_packing(self, self.formats)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Shapes: input_ids [T], returns [T, D]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Shapes: input_ids, positions [T], returns [T, D] on the last stage."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Shapes: hidden_states [N, D], returns [N, vocab]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the trunk's share of the checkpoint, strictly; the drafter loads `mtp.*`."""
        tensors = parameters(
            weights,
            self.config,
            expected=loaded_tensors(self.config),
            ignored=not_loaded_tensors(self.config),
            quantised=self.quantised,
            formats=self.formats,
            layout=self.layout,
            parts=Packer(self),
            attach=attacher(self, own_rank()),
        )
        return load(self, tensors, self.layout)

    @property
    def fixed(self) -> str | None:
        """Why a server cannot be given other weights; None: it can."""
        return None


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):  # noqa: N801 (vLLM's name)
    """Qwen3.5 and later, dense or with experts, without a vision tower."""

    packed_modules_mapping = FLAT_MODULES
    hf_to_vllm_mapper = LANGUAGE_MODEL  # of the names in a quantisation config
