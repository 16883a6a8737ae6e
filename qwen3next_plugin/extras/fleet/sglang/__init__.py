"""What several SGLang servers share: folder, hand-over, nodes and updates."""

from typing import Any

from qwen3next_plugin.engines.extras import Additions


def check(server_args: Any) -> None:
    """Refuse what would give wrong text in another server, or after a restart."""
    from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
    from qwen3next_plugin.extras.fleet.sglang.folder_flags import check_folder
    from qwen3next_plugin.extras.fleet.sglang.handover_flags import check_handover

    check_folder(server_args, on_cpu=without_gpu())
    check_handover(server_args)


def complete(server_args: Any) -> list[str]:
    """Fill in what no flag says; returns it as command-line flags."""
    from qwen3next_plugin.extras.fleet.sglang.handover_flags import complete_handover, hands_over
    from qwen3next_plugin.extras.fleet.sglang.nodes import complete_nodes
    from qwen3next_plugin.extras.fleet.sglang.shared_settings import weights

    complete_nodes(server_args)
    if hands_over(server_args) or server_args.enable_unified_cache_external_linker:
        weights(server_args)  # hashes all files once, not in each rank
    return complete_handover(server_args)


ADDS = Additions(
    patches=("handover", "kept_prefixes", "nodes", "staged_updates", "updates"),
    check=check,
    complete=complete,
    flags=("disaggregation_mode", "enable_unified_cache_external_linker", "nnodes"),
)
