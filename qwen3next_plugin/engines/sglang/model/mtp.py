"""The drafter that ships in the checkpoint of every model of the family."""

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.cpu.quantisation import (
    goes_by_files,
    head_for_drafts,
    use_packing,
)
from qwen3next_plugin.engines.sglang.model.loading import OurModel, load
from qwen3next_plugin.engines.sglang.model.trunk import make_decoder_layer
from qwen3next_plugin.engines.sglang.model.vocabulary import make_embedding, make_logits_processor
from qwen3next_plugin.model.checkpoint.reading import require_mtp
from qwen3next_plugin.model.checkpoint.tensors import mtp_tensors, name_in_drafter, trunk_tensors
from qwen3next_plugin.model.quantisation.packing import drop_plain
from qwen3next_plugin.mtp.draft_head import DraftHead
from qwen3next_plugin.mtp.head import MTPHead


class Predictor:
    """Calls a neutral head with SGLang's batch."""

    embed_tokens: Any
    predict: Any
    has_axes = False  # positions have three, as those of images do

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> Any:
        """Shapes: input_ids, positions [T], the batch's hidden states as of the neutral head."""
        # SGLang's CUDA graphs bring some for every model, and fill them in for images only.
        if self.has_axes and forward_batch.mrope_positions is not None:
            positions = forward_batch.mrope_positions
        embeds = self.embed_tokens(input_ids)
        hidden_states = forward_batch.spec_info.hidden_states
        return self.predict(positions, embeds, hidden_states, forward_batch)


def make_draft_embedding(config: Qwen3NextConfig) -> nn.Module:
    """On the meta device: SGLang sets its weight to the trunk's."""
    with torch.device("meta"):
        return make_embedding(config)


class MultiTokenPredictor(Predictor, MTPHead):
    """The neutral head, from SGLang's parts."""

    def __init__(
        self, config: Qwen3NextConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            # Others read config.json, which does not name it although it is unquantised.
            quant_config=quant_config if goes_by_files(quant_config) else None,
            prefix=f"{prefix}.fc",
        )
        layer = make_decoder_layer(
            config,
            quant_config,
            f"{prefix}.layers.0",
            layer_id=0,
            layer_type="full_attention",
            is_moe=config.num_experts > 0,
        )
        embed_tokens = make_draft_embedding(config)
        super().__init__(config, embed_tokens=embed_tokens, fc=fc, layers=[layer])


class Qwen3NextForCausalLMMTP(OurModel):
    """Qwen3-Next's as SGLang's registry knows it; replaces the built-in model of that name."""

    predictor_class: type[Any] = MultiTokenPredictor

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self._set_config(config, quant_config)
        self.model = self.predictor_class(self.config, quant_config, prefix=f"{prefix}mtp")
        texts_only = getattr(config, "language_model_only", False)
        self.model.has_axes = bool(self.config.mrope_section) and not texts_only
        self.lm_head: ParallelLMHead | VocabParallelEmbedding | None = None  # the trunk's
        self.logits_processor = make_logits_processor(config)
        use_packing(self.model, self.formats, drafting=self.model.layers)
        self.draft_head: DraftHead | None = None
        # Of a wrapper. SGLang gives image tokens ids by content, beyond the vocabulary.
        wrapped = config.get_text_config() is not config
        self.image_token_id = config.image_token_id if wrapped else None
        self.trunk_names = frozenset(trunk_tensors(self.config))

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """For draft trees, which SGLang drafts itself: logits, and the hidden states.

        Shapes: input_ids, positions [T], forward_batch.spec_info.hidden_states [T, D]
        """
        hidden_states, _ = self.states(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    @torch.no_grad()
    def states(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What drafts come from, and what the next pass reads.

        They are the same, but for a model whose residual has several streams.

        Shapes: input_ids, positions [T], forward_batch.spec_info.hidden_states as returned:
            [T, D], and [T, D] or [T, hc·D]
        """
        out = self.model(self._known(input_ids), positions, forward_batch)
        return out if isinstance(out, tuple) else (out, out)

    def make_draft_head(self) -> None:
        """Draft by an int8 copy of the head from now on: a chain needs one token, no logits."""
        assert self.lm_head is not None
        shard = self.lm_head.shard_indices
        head, stays = head_for_drafts(self.lm_head)
        self.draft_head = DraftHead(
            head,
            stays=stays,
            first=shard.org_vocab_start_index,
            end=shard.org_vocab_end_index,
            vocab_size=self.config.vocab_size,
            ranks=get_parallel().tp_group,
        )
        if not stays:
            drop_plain(self.lm_head)

    def see(self, token_ids: torch.Tensor) -> None:
        """Let the draft vocabulary follow these tokens. Shapes: token_ids [T]."""
        if self.draft_head is not None:
            self.draft_head.see(self._known(token_ids))

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens, by the draft head. Shapes: hidden_states [N, D], returns [N]."""
        assert self.draft_head is not None
        return self.draft_head(hidden_states)

    def _known(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The token ids, with the model's own id for image tokens; that costs drafts, no tokens."""
        if self.image_token_id is None:
            return token_ids
        return token_ids.masked_fill(token_ids >= self.config.vocab_size, self.image_token_id)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load `mtp.*`, strictly."""
        weights, expected = require_mtp(weights, self.config), mtp_tensors(self.config)
        tensors = self._checked(weights, expected=expected, ignored=self.trunk_names)
        load(self, ((name_in_drafter(name), tensor) for name, tensor in tensors))

    # What SGLang asks of a drafter.

    def set_embed_and_head(self, embed: nn.Parameter, head: nn.Parameter) -> None:
        """Share the trunk's embedding; the head follows as a module."""
        self.model.embed_tokens.weight = embed

    def set_lm_head_from_target(self, lm_head: ParallelLMHead | VocabParallelEmbedding) -> None:
        """Share the trunk's head."""
        self.lm_head = lm_head


class Qwen3_5ForCausalLMMTP(Qwen3NextForCausalLMMTP):  # noqa: N801 (SGLang's name)
    """That of Qwen3.5 and later models, dense or with experts."""


EntryClass = [Qwen3NextForCausalLMMTP, Qwen3_5ForCausalLMMTP]
