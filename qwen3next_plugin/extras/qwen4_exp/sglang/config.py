"""Qwen4-Exp's config, pools and drafter in SGLang, which serves it on GPUs by another name."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from sglang.srt.arg_groups import overrides

from qwen3next_plugin.config import rope
from qwen3next_plugin.engines.patching import Attribute
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.model.config import at_interval
from qwen3next_plugin.engines.sglang.names import is_ours, serves
from qwen3next_plugin.engines.sglang.patches import TABLE, When, patch
from qwen3next_plugin.extras.qwen4_exp.sglang import DRAFTER, STREAMS

STREAMS_TYPE = "qwen4_exp_text"
# Fields that its config may have beside its text model's.
OF_BOTH_LEVELS = ("dtype", "quantization_config", "compression_config", "mtp_num_hidden_layers")


def for_texts(config: Any) -> Any:
    """The config of Qwen4-Exp's text model, on a CPU, by a name for which SGLang has no code."""
    if not without_gpu():
        return config
    text = config.get_text_config()
    if getattr(text, "model_type", None) != STREAMS_TYPE:
        return config
    outer, text = config, deepcopy(text)
    if text.layer_types is None:
        text.layer_types = at_interval(text)
    if outer.model_type != STREAMS_TYPE:
        text.served_for_texts = (outer.architectures or [outer.model_type])[0]
        for name in OF_BOTH_LEVELS:
            if getattr(text, name, None) is None and hasattr(outer, name):
                setattr(text, name, getattr(outer, name))
        text.tie_word_embeddings |= outer.tie_word_embeddings
    for name in rope.OF_IMAGES:
        for parameters in (text.rope_parameters, text.rope_scaling):
            parameters.pop(name, None)
    text.architectures = [STREAMS]
    return text


@patch(
    When.ON_CPU,
    "sglang.srt.configs.model_config.ModelConfig._config_draft_model",
    reason="SGLang knows Qwen4-Exp by another name, for which it has code for GPUs",
    remove_when="SGLang serves Qwen4ExpForCausalLM",
)
def name_drafter(host: Callable[[Any], None], model_config: Any) -> None:
    """Around `_config_draft_model`: the drafter of Qwen4-Exp's text model."""
    if not model_config.is_draft_model or model_config.hf_config.architectures[0] != STREAMS:
        host(model_config)
        return
    config = deepcopy(model_config.hf_config)  # SGLang's is also the trunk's
    config.architectures = [DRAFTER]
    config.num_nextn_predict_layers = 1
    model_config.hf_config = model_config.hf_text_config = config


@patch(
    When.ON_CPU,
    "sglang.srt.layers.attention.qsa.config.parse_qsa_profile",
    reason="SGLang's pools of sparse attention are of pages of 64 tokens, in bf16, for kernels "
    "on GPUs",
    remove_when="SGLang's sparse attention runs on a CPU",
)
def no_profile(host: Callable[[Any], Any], config: Any) -> Any:
    """Around `parse_qsa_profile`: SGLang's pools and kernels of sparse attention are not ours."""
    return None if config is not None and serves(config) else host(config)


@patch(
    When.WITH_OURS,
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._get_ple_req_pool_kwargs",
    reason="our pages hold what n-gram embeddings keep, and SGLang takes no list of eos tokens",
    remove_when="a config can name its pool's class",
)
def no_ngram_pools(host: Callable[[Any], dict[str, Any]], configurator: Any) -> dict[str, Any]:
    """Leave out SGLang's pools of what n-gram embeddings keep: ours are parts of the pages."""
    return {} if is_ours(configurator.model_config) else host(configurator)


TABLE.add(
    Attribute(
        target="sglang.srt.arg_groups.overrides._MAMBA_RADIX_CACHE_ARCHS",
        value=overrides._MAMBA_RADIX_CACHE_ARCHS | {STREAMS},
        group=When.ON_CPU,
        reason="SGLang knows Qwen4-Exp by another name, for which it has code for GPUs",
        remove_when="SGLang serves Qwen4ExpForCausalLM",
    ),
)
