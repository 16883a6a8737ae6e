"""Qwen3.5 and later as vision-language models: SGLang's vision tower around our text model."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration
from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.engines.sglang.cpu.quantisation import use_packing
from qwen3next_plugin.engines.sglang.model.loading import OurModel
from qwen3next_plugin.engines.sglang.model.trunk import Qwen3NextModel
from qwen3next_plugin.engines.sglang.model.vocabulary import make_lm_head, make_logits_processor
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.layouts import check_tower

VISION = re.compile(r"(model\.)?visual\.")  # prefix of the tower's tensors


class Qwen3_5ForConditionalGeneration(  # noqa: N801 (SGLang's name)
    OurModel, Qwen3VLForConditionalGeneration
):
    """A dense model. With --language-model-only it has no tower, and SGLang refuses images."""

    hf_to_sglang_mapper = None
    model: Qwen3NextModel
    visual: Any  # None: text alone

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        sizes = read_config(config, get_parallel().tp_size)

        def make_text_model(**_: Any) -> Qwen3NextModel:
            return Qwen3NextModel(sizes, quant_config, prefix=f"{prefix}model.language_model")

        super().__init__(config, quant_config, prefix, make_text_model)
        if self.use_deepstack:
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes = {self.deepstack_visual_indexes}: no "
                f"model of this family has them; add --language-model-only to serve text"
            )
        self._set_config(config, quant_config)
        self.lm_head = make_lm_head(sizes, quant_config, self.model.embed_tokens)
        self.logits_processor = make_logits_processor(config)
        use_packing(self.model, self.formats)
        use_packing(
            self.lm_head,
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
        """Shapes: input_ids, positions [T]; input_embeds [T, D], without a tower only."""
        if self.visual is None:
            hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        else:
            # A CUDA graph holds one of both, so it has to be the one for images.
            axes = positions.is_cuda or has_images(forward_batch)
            hidden_states = general_mm_embed_routine(
                input_ids=input_ids,
                forward_batch=forward_batch,
                language_model=self.model,
                multimodal_model=self,
                positions=forward_batch.mrope_positions if axes else positions,
            )
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load text model and tower, strictly; the drafter loads `mtp.*`."""
        super().load_weights(self._load_tower(weights))

    def _load_tower(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the tower's tensors; yield the others."""
        parameters = {} if self.visual is None else dict(self.visual.named_parameters())
        missing = set(parameters)
        for name, tensor in weights:
            if not (prefix := VISION.match(name)):
                yield name, tensor
                continue
            if self.visual is None:
                continue
            inside = name[prefix.end() :].replace(".attn.qkv.", ".attn.qkv_proj.")
            if inside not in parameters:
                raise CheckpointError(
                    f"unexpected tensor {name}: vision_config has no place for it; config.json "
                    f"and the safetensors files do not belong together"
                )
            parameter = parameters[inside]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            missing.discard(inside)
        check_tower({f"visual.{name}" for name in missing})

    # What SGLang asks of a model.

    @property
    def end_layer(self) -> int:
        return len(self.model.layers)

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the drafter shares."""
        return self.model.embed_tokens.weight, self.lm_head.weight


class Qwen3_5MoeForConditionalGeneration(Qwen3_5ForConditionalGeneration):  # noqa: N801
    """The same with experts."""


def has_images(forward_batch: ForwardBatch) -> bool:
    """Whether a request of the batch has images, whose positions have three axes."""
    return any(images is not None for images in forward_batch.mm_inputs or ())


EntryClass = [Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration]
