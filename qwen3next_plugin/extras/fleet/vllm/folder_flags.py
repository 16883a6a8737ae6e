"""FolderSpec's settings: checked, and completed for vLLM, before a worker starts."""

import os
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.extras.fleet.block_files import SPACE, check_settings
from qwen3next_plugin.extras.fleet.computed_by import digest
from qwen3next_plugin.extras.fleet.vllm.shared_settings import (
    WITHOUT,
    check_known_weights,
    settings_of,
    weights,
)

logger = init_logger(LOGGER)

KEEPER, SPEC, TIER = "OffloadingConnector", "FolderSpec", "FolderTier"
OWN = ("spec_name", "spec_module_path", "folder", "folder_bytes", "cpu_bytes_to_use")
SEED = "PYTHONHASHSEED"  # of vLLM's keys; has a default for sha256 only
MEMORY = 1 << 30  # bytes of cpu_bytes_to_use, by default
OWN_REGION = "qwen3next_"  # how an engine's part of the name of our shared memory begins
REGIONS = f"vllm_offload_{OWN_REGION}*.mmap"  # in /dev/shm
FIELD = "kv_connector_extra_config of --kv-transfer-config"


def in_folder(vllm_config: VllmConfig) -> bool:
    """Whether the prefix cache is kept in a folder."""
    asked = _asked(vllm_config) is not None
    return asked and vllm_config.kv_transfer_config.kv_connector == KEEPER


def _asked(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """The user's settings, if FolderSpec is asked for."""
    transfer: KVTransferConfig | None = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector_extra_config.get("spec_name") != SPEC:
        return None
    return transfer.kv_connector_extra_config


def _is_complete(settings: dict[str, Any]) -> bool:
    """Whether complete_folder has written to them: vLLM completes its configuration repeatedly."""
    return [tier.get("type") for tier in settings.get("secondary_tiers", ())] == [TIER]


def check_folder(vllm_config: VllmConfig) -> None:
    """Refuse a folder that cannot be used, and flags with which it would give wrong text.

    Raises:
        ConfigError: names the setting and the fix.
    """
    settings = _asked(vllm_config)
    if settings is None or _is_complete(settings):
        return
    if unknown := sorted(set(settings) - set(OWN)):
        raise ConfigError(f"{FIELD}: {SPEC} has no {', '.join(unknown)}; it has {', '.join(OWN)}")
    numbers = ("folder_bytes", "cpu_bytes_to_use")
    check_settings({"cpu_bytes_to_use": MEMORY} | settings, numbers, FIELD, logger.warning)
    _check_flags(vllm_config)
    _check_keys(vllm_config.cache_config.prefix_caching_hash_algo)


def _check_flags(vllm_config: VllmConfig) -> None:
    """Refuse flags with which files would be missing, incomplete, or from another model."""
    nodes = vllm_config.parallel_config.nnodes
    if not current_platform.is_cpu():
        raise ConfigError(f"{SPEC} copies on CPUs only; on a GPU vLLM has TieringOffloadingSpec")
    if not vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            f"{SPEC} keeps the prefix cache, which is off: leave out --no-enable-prefix-caching, "
            f"{WITHOUT}"
        )
    if nodes > 1:
        raise ConfigError(
            f"nnodes = {nodes}: {SPEC} writes what one machine's ranks have in memory; use one "
            f"machine, {WITHOUT}"
        )
    check_known_weights(vllm_config, SPEC)


def _check_keys(algorithm: str) -> None:
    """Refuse keys that differ from start to start."""
    if not algorithm.startswith("sha256") and SEED not in os.environ:
        raise ConfigError(
            f"prefix_caching_hash_algo = {algorithm}: vLLM seeds it at random, so a start would "
            f"find no earlier one's files; leave out --prefix-caching-hash-algo, or set {SEED}, "
            "alike for all servers"
        )


def complete_folder(vllm_config: VllmConfig, config: Qwen3NextConfig) -> None:
    """Add the settings of vLLM's tiers that follow from FolderSpec's."""
    settings = _asked(vllm_config)
    if settings is None or _is_complete(settings):
        return
    settings.setdefault("cpu_bytes_to_use", MEMORY)
    settings["secondary_tiers"] = [
        {
            "type": TIER,
            "module_path": f"{__package__}.folder_tier",
            "folder": settings["folder"],
            "folder_bytes": settings["folder_bytes"],
            "space": _space(vllm_config, config),
        }
    ]


def _space(vllm_config: VllmConfig, config: Qwen3NextConfig) -> str:
    """The name of the subfolder, which depends on the weights and all else in a page."""
    found = settings_of(vllm_config, config)
    rest = digest((found, vllm_config.cache_config.prefix_caching_hash_algo))
    return f"{SPACE}{weights(vllm_config)}-{found.dtype}-k{found.layout.num_drafts}-{rest}"
