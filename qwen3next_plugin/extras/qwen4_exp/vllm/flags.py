"""vLLM's flags for Qwen4-Exp (Qwen3.8-Flash-Next): what is refused, and what is left out."""

from vllm.config import VllmConfig
from vllm.logger import init_logger

from qwen3next_plugin.config import ConfigError, rope
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig

logger = init_logger(LOGGER)


def check_streams(config: Qwen4ExpConfig, vllm_config: VllmConfig) -> None:
    """Refuse what the model with several streams does not support.

    Raises:
        ConfigError: names the flag and the fix.
    """
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "enable_lora: adapters of a model with several streams are not served; leave out "
            "--enable-lora, or merge the adapter"
        )
    if vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            "kv_transfer_config: caches of a model with several streams are not kept in files or "
            "handed over; leave out --kv-transfer-config"
        )
    dtype = str(model_config.dtype).removeprefix("torch.")
    if config.indexer_n_heads and cache_config.cache_dtype not in ("auto", dtype):
        raise ConfigError(
            f"kv_cache_dtype = {cache_config.cache_dtype}: sparse attention reads keys in the "
            f"activations' dtype; leave out --kv-cache-dtype"
        )
    if config.ple_layer_ids and model_config.enable_prompt_embeds:
        raise ConfigError(
            "enable_prompt_embeds: n-grams are of tokens; leave out --enable-prompt-embeds"
        )
    if config.ple_layer_ids and (found := vllm_config.load_config.load_format) not in READ_HERE:
        raise ConfigError(
            f"load_format = {found}: the table of n-grams is read from safetensors files; leave "
            f"out --load-format"
        )


def read_texts_only(vllm_config: VllmConfig) -> None:
    """Of a model with a vision tower, serve the text model: its positions have one axis."""
    model_config = vllm_config.model_config
    if getattr(model_config.hf_config, "vision_config", None) is None:
        return
    logger.info_once(
        "qwen3next_plugin: %s is served for texts, as with --language-model-only; its vision tower "
        "is not loaded",
        model_config.architecture,
    )
    for config in (model_config.hf_config, model_config.hf_text_config):
        for name in rope.OF_IMAGES:
            (getattr(config, "rope_parameters", None) or {}).pop(name, None)
