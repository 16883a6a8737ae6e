"""What several vLLM servers share: folder, hand-over, nodes and reloads."""

from collections.abc import Iterable
from typing import Any

from qwen3next_plugin.engines.extras import Additions


def check(vllm_config: Any) -> None:
    """Refuse what would give wrong text in another server, or after a restart."""
    from qwen3next_plugin.extras.fleet.vllm.folder_flags import check_folder
    from qwen3next_plugin.extras.fleet.vllm.handover_flags import check_handover
    from qwen3next_plugin.extras.fleet.vllm.ray_flags import check_ray

    check_ray(vllm_config)
    check_folder(vllm_config)
    check_handover(vllm_config)


def complete(vllm_config: Any) -> list[str]:
    """Choose a node's address; remove what killed servers left; complete a connector's settings."""
    from qwen3next_plugin.engines.vllm.flags import read_config
    from qwen3next_plugin.extras.fleet.vllm.folder_flags import REGIONS, complete_folder
    from qwen3next_plugin.extras.fleet.vllm.handover_flags import complete_handover
    from qwen3next_plugin.extras.fleet.vllm.nodes import complete_nodes
    from qwen3next_plugin.machine.leftovers import remove_dead

    complete_nodes(vllm_config)
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


def reload(worker: Any, path: str | None, given: Iterable[tuple[str, Any]] | None) -> str | None:
    """Serve other weights, if they are whole; returns why they are refused."""
    from qwen3next_plugin.extras.fleet.vllm.reloading import reload_weights

    return reload_weights(worker, path, given)


ADDS = Additions(
    patches=("handover", "leases", "nodes", "reloads"),
    check=check,
    complete=complete,
    start=start,
    reload=reload,
    executors={"ray": f"{__package__}.ray_executor.RayExecutor"},
    flags=("kv_transfer_config.kv_connector", "parallel_config.nnodes"),
)
