"""Repairs of vLLM. Without them the plugin still serves."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def before_load(*_: Any) -> None:
    """Watch what is read of adapters, where there are any."""
    from vllm.config import get_current_vllm_config

    from qwen3next_plugin.engines.vllm.patches import When, apply

    if get_current_vllm_config().lora_config is not None:
        apply(When.WITH_LORA)


ADDS = Additions(
    patches=(
        *("adapters", "checks", "exit_code", "grammars", "images", "interrupts", "logprobs"),
        "params",
    ),
    before_load=before_load,
)
