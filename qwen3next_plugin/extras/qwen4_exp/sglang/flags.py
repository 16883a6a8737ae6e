"""SGLang's flags for Qwen4-Exp (Qwen3.8-Flash-Next): what is refused, and what is left out."""

from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.sglang.flags import BACKEND_FLAGS, refusal
from qwen3next_plugin.engines.sglang.names import (
    ATTENTION_BACKEND,
    HOST_BACKEND,
    TORCH_BACKEND,
    logger,
)
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig


def check_streams(config: Qwen4ExpConfig, server_args: Any, *, on_cpu: bool) -> None:
    """Refuse what the model with several streams does not support.

    Raises:
        ConfigError: names the flag and the fix.
    """
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


def check_backends(config: Qwen4ExpConfig, server_args: Any) -> None:
    """Refuse attention backends that read all tokens.

    Raises:
        ConfigError: names the flag and the fix.
    """
    if not config.indexer_n_heads or server_args.speculative_algorithm:  # the core refuses them
        return
    for name in BACKEND_FLAGS:
        if (value := server_args._raw_input[name]) in (TORCH_BACKEND, HOST_BACKEND):
            fix = f"use {ATTENTION_BACKEND}, or leave it out"
            raise refusal(name, value, "it computes no sparse attention", fix)


def say_texts_only(hf_config: Any) -> None:
    """Log that a vision tower is left out."""
    if named := getattr(hf_config, "served_for_texts", None):
        logger.info(
            "qwen3next_plugin: %s is served for texts; its vision tower is not loaded", named
        )
