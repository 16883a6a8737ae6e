"""LoRA adapters on a CPU, whose flags and files are checked at start."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def check(server_args: Any) -> None:
    """Refuse an adapter that cannot be served."""
    from qwen3next_plugin.extras.adapters.sglang.flags import check_adapters

    check_adapters(server_args)


ADDS = Additions(patches=("hooks",), check=check, flags=("enable_lora", "lora_paths"))
