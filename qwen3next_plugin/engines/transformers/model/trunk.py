"""transformers' causal language models of the family, with the MTP head as a part of them.

They replace the host's classes of the same names. Without `use_mtp` they behave like those, except
that with QWEN3NEXT_BATCH_INVARIANT=1 they compute as the engines do.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM as HostQwen35
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeForCausalLM as HostQwen35Moe,
)
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextForCausalLM as HostQwen3Next

from qwen3next_plugin import env
from qwen3next_plugin.config.fields import check_text_model
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.transformers import flags
from qwen3next_plugin.engines.transformers.model.invariant import use_invariant
from qwen3next_plugin.engines.transformers.model.linear_attention import on_pages
from qwen3next_plugin.engines.transformers.model.mtp import MultiTokenPredictor
from qwen3next_plugin.engines.transformers.speculation.answers import Answers
from qwen3next_plugin.engines.transformers.speculation.worker import Worker
from qwen3next_plugin.engines.transformers.state.cache import RowCache
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.tensors import MTP

Base: Any = object  # each class below adds the host's as another base


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """A text model's config, with the quantisation that may stand beside it."""
    text = config.get_text_config()
    if text is not config and hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    return text


class WithMTP(Base):
    """Mixin with what the classes below add to the host's."""

    host: Any  # the host's class
    mtp: Any  # None: the checkpoint has no mtp.* tensors
    cache_class = RowCache
    _keys_to_ignore_on_load_unexpected = (r"^model\.(visual|vision_tower|merger)\.",)

    def __init__(self, config: Any) -> None:
        check_text_model(config.to_dict())
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer, "linear_attn"):
                of_host = layer.linear_attn
                layer.linear_attn = on_pages(of_host.__class__)(config, of_host.layer_idx)
        self.mtp = self._make_mtp(config)
        self.post_init()
        if env.batch_invariant():
            use_invariant(self)

    def _make_mtp(self, config: Any) -> Any:
        """The MTP head, of the parts that the host's model has."""
        layer, norm = type(self.model.layers[0]), type(self.model.norm)
        return MultiTokenPredictor(config, layer=layer, norm=norm)

    def run_trunk(self, **given: Any) -> tuple[Tensor, Tensor]:
        """Run the host's model; returns the output head's input and the MTP head's."""
        hidden = self.model(**given).last_hidden_state
        return hidden, hidden

    @override(
        "transformers.modeling_utils.PreTrainedModel.from_pretrained",
        reason="damaged files end transformers in errors that name none",
        remove_when="transformers names file and fix",
    )
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        """The host's method, after a check that the folder's files are whole.

        Raises:
            ConfigError, CheckpointError: name the file and what is wrong.
        """
        flags.check_files(pretrained_model_name_or_path)
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):  # of a wrapper that names no class of it
            kwargs["config"] = text_config_of(config)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @override(
        "transformers.modeling_utils.PreTrainedModel.is_custom_code",
        reason="tensors of a class from elsewhere are not converted, so experts would be missing",
        remove_when="a subclass is converted as its base",
    )
    @classmethod
    def is_custom_code(cls) -> bool:
        """Tensors are converted as those of the host's class."""
        return False

    @override(
        "transformers.modeling_utils.PreTrainedModel._can_set_experts_implementation",
        reason="it looks for a decorator in the source of the class's module",
        remove_when="it looks at the bases of a class",
    )
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.host._can_set_experts_implementation()

    @override(
        "transformers.modeling_utils.PreTrainedModel._adjust_missing_and_unexpected_keys",
        reason="a checkpoint without mtp.* loads without an MTP head, one with a part is refused",
        remove_when="transformers keeps mtp.* of this family",
    )
    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Leave the MTP head out if the checkpoint has none; refuse an incomplete one.

        Raises: CheckpointError
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing = {key for key in loading_info.missing_keys if key.startswith(MTP)}
        if not missing:
            return
        head = self.state_dict().keys()
        if missing != {name for name in head if name.startswith(MTP)}:
            raise CheckpointError(
                f"{len(missing)} MTP tensors are missing, the first is {min(missing)}: the "
                f"checkpoint is incomplete; download it again, or check "
                f"model.safetensors.index.json"
            )
        self.mtp = None
        loading_info.missing_keys -= missing

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The host's `generate`. With `use_mtp=True` the MTP head drafts, and the text is the same.

        `num_assistant_tokens` (1 to 8; 3) is the number of drafts in a step.

        Raises:
            CheckpointError: the checkpoint has no MTP head.
            RequestError: an argument or the model's dtype does not go with drafts.
            NotImplementedError: no kernels run on the model's device.
        """
        arguments = signature(super().generate).bind_partial(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        configs = [arguments.get("generation_config"), self.generation_config]
        drafts = flags.given("use_mtp", arguments, configs)
        if drafts or env.batch_invariant():
            flags.check(self, arguments, configs)
        if drafts and flags.given("num_assistant_tokens", arguments, configs) is None:
            kwargs["num_assistant_tokens"] = flags.DRAFTS
        return super().generate(*args, **kwargs)

    @override(
        "transformers.generation.utils.GenerationMixin._validate_generation_mode",
        reason="transformers refuses drafts for every model with a recurrent state",
        remove_when="its recurrent cache can go back to any token of a step",
    )
    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        """Allow drafts, which the host refuses for recurrent states; ours can roll back."""
        if not generation_config.use_mtp:
            super()._validate_generation_mode(
                generation_mode, generation_config, generation_mode_kwargs
            )

    @override(
        "transformers.generation.utils.GenerationMixin._assisted_decoding",
        reason="its loop takes one prompt, and its cache leaves rejected drafts in the state",
        remove_when="its recurrent cache can go back, row by row",
    )
    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by the host's `generate` with `use_mtp`, after other arguments are refused."""
        rules = (logits_processor, stopping_criteria, generation_config, streamer)
        num_drafts = generation_config.num_assistant_tokens
        flags.refuse_synced(synced_gpus, num_drafts)
        return self._answer(input_ids, rules, model_kwargs, num_drafts=num_drafts)

    @override(
        "transformers.generation.utils.GenerationMixin._sample",
        reason="its cache holds other states than those that have the engines' bits",
        remove_when="its layers can be given caches of their own",
    )
    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by the host's `generate` without drafts: its loop, or ours with our cache."""
        rules = (logits_processor, stopping_criteria, generation_config, streamer)
        if env.batch_invariant():
            flags.refuse_synced(synced_gpus, 0)
            return self._answer(input_ids, rules, model_kwargs, num_drafts=0)
        return super()._sample(input_ids, *rules[:3], synced_gpus, streamer, **model_kwargs)

    def _answer(
        self,
        input_ids: Tensor,
        rules: tuple[Any, Any, Any, Any],
        model_kwargs: Mapping[str, Any],
        *,
        num_drafts: int,
    ) -> Any:
        """Our loop. `rules`: processors, criteria, config and streamer of the host's."""
        processors, criteria, config, streamer = rules
        asked = flags.asking(num_drafts)
        positions, padding = flags.prompt(input_ids, processors, model_kwargs, asked)
        answers = Answers(
            input_ids, processors=processors, criteria=criteria, config=config, streamer=streamer
        )
        return Worker(
            self, answers, positions=positions, padding=padding, num_drafts=num_drafts
        ).run()


class Qwen3NextForCausalLM(WithMTP, HostQwen3Next):
    """Qwen3-Next."""

    host = HostQwen3Next


class Qwen3_5ForCausalLM(WithMTP, HostQwen35):  # noqa: N801 - architectures in config.json
    """The dense text model of Qwen3.5, 3.6 and 3.8."""

    host = HostQwen35


class Qwen3_5MoeForCausalLM(WithMTP, HostQwen35Moe):  # noqa: N801
    """Their text model with experts."""

    host = HostQwen35Moe


MODELS = {  # by model_type; a wrapper's text model too
    "qwen3_next": Qwen3NextForCausalLM,
    "qwen3_5": Qwen3_5ForCausalLM,
    "qwen3_5_text": Qwen3_5ForCausalLM,
    "qwen3_5_moe": Qwen3_5MoeForCausalLM,
    "qwen3_5_moe_text": Qwen3_5MoeForCausalLM,
    "minicpmv4_6": Qwen3_5ForCausalLM,
}
