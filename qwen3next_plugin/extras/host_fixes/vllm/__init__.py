"""What is repaired in vLLM; skip it to see how ours is served without."""

from qwen3next_plugin.engines.extras import Additions

ADDS = Additions(
    patches=(
        *("adapters", "checks", "exit_code", "grammars", "images", "interrupts", "logprobs"),
        "params",
    ),
)
