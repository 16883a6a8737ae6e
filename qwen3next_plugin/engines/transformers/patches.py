"""Everything of transformers that the plugin changes: what, why, for which versions, until when.

Nothing is patched: subclasses of the host's models, which its Auto class loads, override these.
"""

from functools import partial

from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.patching import Entry

VERSIONS = ">=5.16,<5.25"  # that need these patches
Override = partial(patching.Override, versions=VERSIONS)
TRUNK = "model/trunk.py"

TABLE: tuple[Entry, ...] = (
    Override(
        target="transformers.models.auto.modeling_auto.AutoModelForCausalLM._model_mapping",
        file="plugin.py",
        reason="`AutoModelForCausalLM.register` refuses a text model for a wrapper's config, and "
        "before 5.19 the mapping's own `register` ignores configs of transformers",
        remove_when="`AutoModelForCausalLM.register` takes it",
    ),
    Override(
        target="transformers.modeling_utils.PreTrainedModel.from_pretrained",
        parameters=(
            *("cls", "pretrained_model_name_or_path", "model_args", "config", "cache_dir"),
            *("ignore_mismatched_sizes", "force_download", "local_files_only", "token"),
            *("revision", "use_safetensors", "weights_only", "fusion_config", "disable_mmap"),
            "kwargs",
        ),
        file=TRUNK,
        reason="damaged files end transformers in errors that name none",
        remove_when="transformers names file and fix",
    ),
    Override(
        target="transformers.modeling_utils.PreTrainedModel.is_custom_code",
        parameters=("cls",),
        file=TRUNK,
        reason="tensors of a class from elsewhere are not converted, so experts would be missing",
        remove_when="a subclass is converted as its base",
    ),
    Override(
        target="transformers.modeling_utils.PreTrainedModel._can_set_experts_implementation",
        parameters=("cls",),
        file=TRUNK,
        reason="it looks for a decorator in the source of the class's module",
        remove_when="it looks at the bases of a class",
    ),
    Override(
        target="transformers.modeling_utils.PreTrainedModel._adjust_missing_and_unexpected_keys",
        parameters=("self", "loading_info"),
        file=TRUNK,
        reason="a checkpoint without mtp.* loads without an MTP head, one with a part is refused",
        remove_when="transformers keeps mtp.* of this family",
    ),
    Override(
        target="transformers.generation.utils.GenerationMixin._validate_generation_mode",
        parameters=("self", "generation_mode", "generation_config", "generation_mode_kwargs"),
        file=TRUNK,
        reason="transformers refuses drafts for every model with a recurrent state",
        remove_when="its recurrent cache can go back to any token of a step",
    ),
    Override(
        target="transformers.generation.utils.GenerationMixin._sample",
        parameters=(
            *("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"),
            *("synced_gpus", "streamer", "model_kwargs"),
        ),
        file=TRUNK,
        reason="its cache holds other states than those that have the engines' bits",
        remove_when="its layers can be given caches of their own",
    ),
    Override(
        target="transformers.generation.utils.GenerationMixin._assisted_decoding",
        parameters=(
            *("self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"),
            *("synced_gpus", "streamer", "inputs_tensor", "assistant_model"),
            *("assistant_tokenizer", "tokenizer", "model_kwargs"),
        ),
        file=TRUNK,
        reason="its loop takes one prompt, and its cache leaves rejected drafts in the state",
        remove_when="its recurrent cache can go back, row by row",
    ),
)
