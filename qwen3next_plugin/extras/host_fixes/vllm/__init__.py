"""Repairs of vLLM. Without them the plugin still serves."""

from qwen3next_plugin.engines.extras import Additions

ADDS = Additions(
    patches=(
        *("adapters", "checks", "exit_code", "grammars", "images", "interrupts", "logprobs"),
        "params",
    ),
)
