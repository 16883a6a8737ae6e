"""FolderLinker's settings: checked before a worker starts; the subfolder of what may be read."""

from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.extras.fleet.block_files import SPACE, check_settings
from qwen3next_plugin.extras.fleet.computed_by import digest
from qwen3next_plugin.extras.fleet.sglang.shared_settings import (
    LINKER_FLAG,
    check_known_weights,
    settings_of,
    weights,
)

LINKER, MODULE = "FolderLinker", f"{__package__}.folder_linker"
OWN = ("folder", "folder_bytes")
POLICIES = ("fcfs", "lof", "random", "routing-key")  # those that do not look up prefixes
FIELD = "linker_extra_config of --unified-cache-external-linker-config"


def check_folder(server_args: Any, *, on_cpu: bool) -> None:
    """Refuse other linkers, an unusable folder, and flags that do not work with it.

    Raises:
        ConfigError: names the setting and the fix.
    """
    if not server_args.enable_unified_cache_external_linker:
        return
    config = server_args.unified_cache_external_linker_config or {}
    named = config.get("linker"), config.get("linker_module_path")
    if server_args.unified_cache_external_linker_backend != "dynamic" or named != (LINKER, MODULE):
        raise ConfigError(
            f"{LINKER_FLAG}: only {LINKER} of {MODULE} keeps state pages: name it in "
            f"--unified-cache-external-linker-config, with "
            f"--unified-cache-external-linker-backend dynamic"
        )
    if not on_cpu:
        raise ConfigError(f"{LINKER_FLAG}: {LINKER} copies on CPUs only; leave it out")
    settings = config.get("linker_extra_config", {})
    if unknown := sorted(set(settings) - set(OWN)):
        raise ConfigError(f"{FIELD}: {LINKER} has no {', '.join(unknown)}; it has {', '.join(OWN)}")
    check_settings(settings, ("folder_bytes",), FIELD, logger.warning)
    _check_flags(server_args)


def _check_flags(server_args: Any) -> None:
    """Refuse flags with which files would be mixed up, or read again in each step."""
    if server_args.nnodes > 1:
        raise ConfigError(
            f"--nnodes {server_args.nnodes}: {LINKER} writes what one machine's ranks have in "
            f"memory; use one machine, or leave out {LINKER_FLAG}"
        )
    check_known_weights(server_args, LINKER, LINKER_FLAG)
    if server_args.schedule_policy not in POLICIES:
        raise ConfigError(
            f"--schedule-policy {server_args.schedule_policy}: {LINKER} would read the prefixes of "
            f"all waiting requests in each step; use fcfs, or leave out {LINKER_FLAG}"
        )


def space(server_args: Any, model_config: Any, *sizes: Any) -> str:
    """The name of the subfolder, which depends on the weights and all else that pages depend on.

    Args: sizes: of what is kept, on this rank.
    """
    dtype = str(model_config.dtype).removeprefix("torch.")
    rest = digest(settings_of(server_args, model_config, *sizes))
    return f"{SPACE}{weights(server_args)}-{dtype}-{rest}"
