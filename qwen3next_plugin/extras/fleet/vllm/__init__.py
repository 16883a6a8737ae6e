"""What several servers of vLLM share."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def check(vllm_config: Any) -> None:
    """Refuse what would give wrong text in another server, or after a restart."""
    from qwen3next_plugin.extras.fleet.vllm.folder_flags import check_folder
    from qwen3next_plugin.extras.fleet.vllm.handover_flags import check_handover

    check_folder(vllm_config)
    check_handover(vllm_config)


def complete(vllm_config: Any) -> list[str]:
    """Remove what killed servers left in memory; complete a KV connector's settings."""
    from qwen3next_plugin.engines.leftovers import remove_dead
    from qwen3next_plugin.engines.vllm.flags import read_config
    from qwen3next_plugin.extras.fleet.vllm.folder_flags import REGIONS, complete_folder
    from qwen3next_plugin.extras.fleet.vllm.handover_flags import complete_handover

    remove_dead(REGIONS)
    config = read_config(vllm_config)
    complete_folder(vllm_config, config)
    complete_handover(vllm_config, config)
    return []


def start(vllm_config: Any) -> None:
    """Change vLLM's NIXL connector where it is used."""
    from qwen3next_plugin.engines.vllm.patches import apply
    from qwen3next_plugin.extras.fleet.vllm.groups import When
    from qwen3next_plugin.extras.fleet.vllm.handover_flags import hands_over

    if hands_over(vllm_config):
        apply(When.HANDOVER)


ADDS = Additions(
    patches=("handover", "leases"),
    check=check,
    complete=complete,
    start=start,
    flags=("kv_transfer_config.kv_connector",),
)
