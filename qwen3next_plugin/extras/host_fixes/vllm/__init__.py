"""Repairs of vLLM. Without them the plugin still serves."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def before_load(*_: Any) -> None:
    """Refuse adapters with parts that fit no module, where LoRA is on."""
    from vllm.config import get_current_vllm_config_or_none

    from qwen3next_plugin.engines.vllm.patches import When, apply

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is not None and vllm_config.lora_config is not None:
        apply(When.WITH_LORA)


ADDS = Additions(
    patches=(
        *("adapters", "checks", "exit_code", "grammars", "images", "interrupts", "logprobs"),
        "params",
    ),
    before_load=before_load,
)
