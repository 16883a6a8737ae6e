"""The MTP layer of the checkpoint; on a GPU vLLM's own loop drafts with it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.interfaces import MixtureOfExperts, SupportsMultiModalEmbeddings
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.cpu.quantisation import (
    own_rank,
    use_packing,
    with_quantisation,
)
from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.loading import PACKED_MODULES, load
from qwen3next_plugin.engines.vllm.model.moe import describe_experts
from qwen3next_plugin.engines.vllm.model.trunk import Qwen3NextForCausalLM, make_decoder_layer
from qwen3next_plugin.engines.vllm.model.vocabulary import LMHead, make_embedding
from qwen3next_plugin.model.checkpoint.layouts import our_name
from qwen3next_plugin.model.checkpoint.reading import parameters, require_mtp
from qwen3next_plugin.model.checkpoint.tensors import (
    EMBEDDING,
    MTP,
    mtp_tensors,
    name_in_drafter,
    trunk_tensors,
)
from qwen3next_plugin.model.quantisation.layers import attacher
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packing import Packer
from qwen3next_plugin.mtp.draft_head import DraftHead
from qwen3next_plugin.mtp.head import MTPHead

compiled = support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0}
)


class Predictor:
    """The methods of a neutral head that vLLM calls."""

    embed_tokens: Any
    layers: Any
    predict: Any

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
    ) -> Any:
        """Shapes: input_ids [T], positions [T] or [3, T], the others as of the neutral head."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        layer = spec_step_idx % len(self.layers)
        return self.predict(positions, embeds, hidden_states, layer=layer)


def make_draft_embedding(config: Qwen3NextConfig) -> nn.Module:
    """A placeholder for the trunk's embedding, or with pipeline stages an embedding of its own."""
    return PPMissingLayer() if get_pp_group().world_size == 1 else make_embedding(config)


@compiled
class MultiTokenPredictor(Predictor, MTPHead):
    """The neutral head, from vLLM's parts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = read_config(vllm_config)
        fc = host_layers(vllm_config).column_parallel(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            gather_output=True,
            prefix=f"{prefix}.fc",
        )
        layers = (
            make_decoder_layer(
                config,
                vllm_config,
                f"{prefix}.layers.{i}",
                layer_type="full_attention",
                is_moe=config.num_experts > 0,
            )
            for i in range(config.num_nextn_predict_layers)
        )
        super().__init__(config, embed_tokens=make_draft_embedding(config), fc=fc, layers=layers)


class Qwen3NextMTP(nn.Module, MixtureOfExperts, SupportsMultiModalEmbeddings):
    """The drafter as vLLM's registry knows it; replaces the built-in model of that name."""

    packed_modules_mapping = PACKED_MODULES
    predictor_class: type[Any] = MultiTokenPredictor
    fall_back_to_pt_during_load = False  # safetensors only: nothing is unpickled
    update_physical_experts_metadata = Qwen3NextForCausalLM.update_physical_experts_metadata

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        vllm_config = with_quantisation(vllm_config)
        self.config = vllm_config.model_config.hf_config  # vLLM sets fields of it
        self.sizes = read_config(vllm_config)
        self.quantised = vllm_config.quant_config is not None
        self.formats = served_formats(vllm_config.quant_config)
        self.model = self.predictor_class(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "mtp")
        )
        self.lm_head = PPMissingLayer()  # vLLM puts the trunk's here, from the same stage
        self.logits_processor = LogitsProcessor(self.sizes.vocab_size)
        describe_experts(self, self.model.layers)
        use_packing(self, self.formats, drafting=self.model.layers)
        self.trunk_names = frozenset(trunk_tensors(self.sizes))
        if not isinstance(self.model.embed_tokens, PPMissingLayer):
            self.trunk_names -= {EMBEDDING}

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """An image's tokens have the vectors that the trunk had for them.

        Shapes:
            input_ids, is_multimodal [T], multimodal_embeddings [tokens of an image, D] each,
            returns [T, D]
        """
        embeds = self.model.embed_input_ids(input_ids)
        images = [] if multimodal_embeddings is None else [*multimodal_embeddings]
        if images and is_multimodal is not None:
            embeds.masked_scatter_(is_multimodal[:, None], torch.cat(images).to(embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        """Shapes: input_ids [T], positions [T] or [3, T], hidden_states [T, D], returns [T, D]."""
        return self.model(input_ids, positions, hidden_states, inputs_embeds, spec_step_idx)

    def compute_logits(
        self, hidden_states: torch.Tensor, spec_step_idx: int = 0
    ) -> torch.Tensor | None:
        """Shapes: hidden_states [N, D], returns [N, vocab]."""
        return self.logits_processor(self.lm_head, hidden_states)

    @property
    def draft_head(self) -> DraftHead | None:
        """The int8 copy of the trunk's head that drafts choose from; none on a GPU."""
        return self.lm_head.draft_head if isinstance(self.lm_head, LMHead) else None

    def see(self, token_ids: torch.Tensor) -> None:
        """Let the draft vocabulary follow these tokens. Shapes: token_ids [T]."""
        if self.draft_head is not None:
            self.draft_head.see(token_ids)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens, by the draft head. Shapes: hidden_states [N, D], returns [N]."""
        if self.draft_head is not None:
            return self.draft_head(hidden_states)
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load `mtp.*`, strictly, and the embedding if this stage cannot share the trunk's."""
        expected = mtp_tensors(self.sizes)
        if not isinstance(self.model.embed_tokens, PPMissingLayer):
            expected[EMBEDDING] = trunk_tensors(self.sizes)[EMBEDDING]
        tensors = parameters(
            require_mtp(weights, self.sizes),
            self.sizes,
            expected=expected,
            ignored=self.trunk_names,
            quantised=self.quantised,
            formats=self.formats,
            parts=Packer(self, name_in_drafter),
            attach=attacher(self, own_rank()),
        )
        return load(self, ((name_in_drafter(name), tensor) for name, tensor in tensors))

    # What vLLM asks of a drafter.

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Whether vLLM can skip the tensor when it loads the drafter: those of the trunk."""
        name = our_name(name, self.sizes) or ""
        return not name.startswith(MTP) and (name != EMBEDDING or EMBEDDING in self.trunk_names)
