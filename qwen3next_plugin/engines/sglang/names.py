"""Names by which SGLang knows the plugin's parts."""

import logging
from typing import Any

from qwen3next_plugin.engines import extras

PACKAGE = "qwen3next_plugin.engines.sglang"
WRAPPERS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
TEXT_MODELS = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
FAMILY_DRAFTERS = ("Qwen3NextForCausalLMMTP", "Qwen3_5ForCausalLMMTP")
OF_EXTRAS = extras.models("sglang")
DRAFTERS = (*FAMILY_DRAFTERS, *(name for models in OF_EXTRAS for name in models.drafters))
# Served as texts, with and without a vision tower.
TEXTS_ONLY = tuple(name for models in OF_EXTRAS for name in models.trunks)
ARCHITECTURES = (*TEXT_MODELS, *WRAPPERS, *TEXTS_ONLY, *DRAFTERS)
QWEN3_NEXT, DENSE = "qwen3_next", "qwen3_5_text"
MODEL_TYPES = (QWEN3_NEXT, DENSE, "qwen3_5_moe_text")  # of text models
ATTENTION_BACKEND = "qwen3next_cpu"
HOST_BACKEND = "intel_amx"  # SGLang's choice on a CPU with AMX
TORCH_BACKEND = "torch_native"  # SGLang's choice on any other CPU; it cannot draft
LORA_BACKEND = "torch_native"  # SGLang's only one without Triton kernels; ours calls none of it
QUANTISATION = "qwen3next"  # of every quantised checkpoint of ours, on a CPU
PLATFORM = f"{PACKAGE}.cpu.platform:CpuPlatform"
MODEL_PACKAGE = f"{PACKAGE}.model"  # the package in which SGLang looks for model classes
OVERRIDE_FLAG = "--json-model-override-args"
DRAFT_ALGORITHMS = ("NEXTN", "EAGLE")  # SGLang's names for drafts of the checkpoint's MTP head
# The reason with which SGLang refuses to update weights.
NO_UPDATES = (
    "qwen3next_plugin checks, packs and copies weights as a whole checkpoint loads; restart the "
    "server with the new checkpoint"
)

logger = logging.getLogger("sglang.qwen3next_plugin")


def is_ours(model_config: Any) -> bool:
    """Whether the plugin serves this model."""
    return serves(model_config.hf_config)


def serves_ours() -> bool:
    """Whether this process's model is one that the plugin serves."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.runtime_context import get_server_args

    return is_ours(model_config_of(get_server_args()))


def is_loaded_last(model: Any) -> bool:
    """Whether this module is the last of a model of ours to be loaded: with drafts, the drafter."""
    from sglang.srt.runtime_context import get_server_args

    drafts = get_server_args().speculative_algorithm is not None
    return serves_ours() and drafts == (type(model).__name__ in DRAFTERS)


def serves(hf_config: Any) -> bool:
    """Whether the plugin serves the model of a config that SGLang has only read."""
    architectures = hf_config.architectures
    return bool(architectures) and architectures[0] in ARCHITECTURES
