"""Repairs of SGLang. Without them the plugin still serves."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def check(server_args: Any) -> None:
    """Refuse flags with which a server would end or wait; remove what killed servers left."""
    from qwen3next_plugin.extras.host_fixes.sglang.endings import LOADS
    from qwen3next_plugin.extras.host_fixes.sglang.metrics_files import check_room
    from qwen3next_plugin.extras.host_fixes.sglang.ports import check_port
    from qwen3next_plugin.machine.leftovers import remove_dead

    check_port(server_args)
    check_room(server_args)
    remove_dead(LOADS)


ADDS = Additions(
    patches=(
        *("aborts", "controls", "endings", "grammars", "image_names", "patterns", "prompts"),
        *("requests", "sessions", "tokenised"),
    ),
    check=check,
)
