"""SGLang's flags for Qwen4-Exp (Qwen3.8-Flash-Next): what is refused, and what is left out."""

from typing import Any

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.sglang.names import logger

MEDIA = "image_data, video_data, audio_data"
EMBEDS = ("input_embeds", "positional_embed_overrides")


def check_streams(config: Qwen3NextConfig, server_args: Any, *, on_cpu: bool) -> None:
    """Refuse what the model with several streams does not support.

    Raises:
        ConfigError: names the flag and the fix.
    """
    if not config.hc_count:
        return
    if not on_cpu:
        raise ConfigError(
            "Qwen4ExpForCausalLM: the plugin serves a model with several streams on CPUs only; on "
            "a GPU use a checkpoint whose architecture is Qwen4ExpForConditionalGeneration, which "
            "SGLang serves"
        )
    if server_args.enable_lora or server_args.lora_paths:
        flag = "--lora-paths" if server_args.lora_paths else "--enable-lora"
        raise ConfigError(
            f"{flag}: adapters of a model with several streams are not served; leave it out, or "
            f"merge the adapter"
        )
    if server_args.enable_unified_cache_external_linker:
        raise ConfigError(
            "--enable-unified-cache-external-linker: caches of a model with several streams are "
            "not kept in files; leave it out"
        )
    if (mode := server_args.disaggregation_mode) != "null":
        raise ConfigError(
            f"--disaggregation-mode {mode}: caches of a model with several streams are not handed "
            f"over; leave it out"
        )
    if (server_args.speculative_eagle_topk or 1) > 1:
        raise ConfigError(
            f"--speculative-eagle-topk {server_args.speculative_eagle_topk}: a model with several "
            f"streams verifies chains of drafts, no trees; use 1"
        )
    if config.ple_layer_ids and (found := server_args.load_format) not in READ_HERE:
        raise ConfigError(
            f"--load-format {found}: the table of n-grams is read from safetensors files; leave "
            f"it out"
        )


def say_texts_only(hf_config: Any) -> None:
    """Log that a vision tower is left out."""
    if named := getattr(hf_config, "served_for_texts", None):
        logger.info(
            "qwen3next_plugin: %s is served for texts; its vision tower is not loaded", named
        )


def check_streams_request(obj: Any, hf_config: Any) -> None:
    """Refuse images where the tower is left out, and embeddings of tokens that have n-grams.

    Raises:
        ValueError: names the field; SGLang would ignore images.
    """
    if getattr(hf_config, "served_for_texts", None) and obj.contains_mm_input():
        raise ValueError(f"{MEDIA}: this model is served for texts; leave them out")
    for name in EMBEDS if getattr(hf_config, "ple_layer_ids", None) else ():
        if getattr(obj, name) is not None:
            raise ValueError(f"{name}: this model's n-grams are of tokens; send token ids")
