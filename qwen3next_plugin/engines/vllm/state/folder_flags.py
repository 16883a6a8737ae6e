"""FolderSpec's settings: checked, and completed for vLLM, before a worker starts."""

import os
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import vllm
from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform

from qwen3next_plugin import __version__, env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.block_files import SPACE
from qwen3next_plugin.engines.hub import READ_HERE, local_folder
from qwen3next_plugin.engines.processor import instructions
from qwen3next_plugin.engines.vllm.names import PACKAGE
from qwen3next_plugin.engines.vllm.state.pages import largest_page
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.model.checkpoint.fingerprint import fingerprint

SPEC, TIER = "FolderSpec", "FolderTier"
OWN = ("spec_name", "spec_module_path", "folder", "folder_bytes", "cpu_bytes_to_use")
SEED = "PYTHONHASHSEED"  # of vLLM's keys; has a default for sha256 only
MEMORY = 1 << 30  # bytes of cpu_bytes_to_use, by default
FIELD = "kv_connector_extra_config of --kv-transfer-config"


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
    for name in ("folder_bytes", "cpu_bytes_to_use"):
        value = settings.get(name, MEMORY)
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name} = {value!r}: must be a number of bytes, in {FIELD}")
    if "folder_bytes" not in settings:
        raise ConfigError(f"folder_bytes is missing in {FIELD}: the most that the folder may hold")
    _check_writable(settings.get("folder"))
    _check_flags(vllm_config)
    _check_keys(vllm_config.cache_config.prefix_caching_hash_algo)


def _check_writable(folder: Any) -> None:
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise ConfigError(f"folder = {folder!r}: no such folder; make it, or change {FIELD}")
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"folder = {folder!r} cannot be written ({error.strerror}): grant user {os.getuid()} "
            f"that, or name another in {FIELD}"
        ) from error


def _check_flags(vllm_config: VllmConfig) -> None:
    """Refuse flags with which files would be missing, incomplete, or another model's."""
    load_format = vllm_config.load_config.load_format
    nodes = vllm_config.parallel_config.nnodes
    without = "or leave out --kv-transfer-config"
    if not current_platform.is_cpu():
        raise ConfigError(f"{SPEC} copies on CPUs only; on a GPU vLLM has TieringOffloadingSpec")
    if not vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            f"{SPEC} keeps the prefix cache, which is off: leave out --no-enable-prefix-caching, "
            f"{without}"
        )
    if nodes > 1:
        raise ConfigError(
            f"nnodes = {nodes}: {SPEC} writes what one machine's ranks have in memory; use one "
            f"machine, {without}"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError(
            f"enable_lora: {SPEC} knows an adapter by its path only, whatever its weights were; "
            f"serve without adapters, {without}"
        )
    if load_format not in READ_HERE:
        raise ConfigError(
            f"load_format = {load_format}: {SPEC} knows weights by their safetensors files; leave "
            f"out --load-format, {without}"
        )


def _check_keys(algorithm: str) -> None:
    """Refuse keys that differ from start to start."""
    if not algorithm.startswith("sha256") and SEED not in os.environ:
        raise ConfigError(
            f"prefix_caching_hash_algo = {algorithm}: vLLM seeds it at random, so a start would "
            f"find no earlier one's files; leave out --prefix-caching-hash-algo, or set {SEED}, "
            "alike for all servers"
        )


def refuse_other_weights(vllm_config: VllmConfig) -> None:
    """Raise where files of this start's weights would be read for others."""
    if _asked(vllm_config) is not None:
        raise ConfigError(
            f"reload_weights: {SPEC} would serve prefixes of the weights that it started with; "
            "restart the server, or serve without --kv-transfer-config"
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
            "module_path": f"{PACKAGE}.state.folder_tier",
            "folder": settings["folder"],
            "folder_bytes": settings["folder_bytes"],
            "space": _space(vllm_config, config),
        }
    ]


def _space(vllm_config: VllmConfig, config: Qwen3NextConfig) -> str:
    """The name of the subfolder for these weights, and for all that decides what a page holds."""
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    layout = largest_page(config, vllm_config)
    others = (
        layout,
        sorted(model_config.hf_config.to_dict().items(), key=str),
        cache_config.cache_dtype,
        cache_config.prefix_caching_hash_algo,
        (env.quantise(), env.batch_invariant()),
        # KV is laid out as vLLM's attention on this processor reads it; bits are our kernels'.
        (__version__, vllm.__version__, str(torch.__version__), described("cpu"), instructions()),
    )
    dtype = str(model_config.dtype).removeprefix("torch.")
    downloads = vllm_config.load_config.download_dir
    weights = fingerprint(local_folder(model_config.model, model_config.revision, downloads))
    rest = sha256(repr(others).encode()).hexdigest()[:16]
    return f"{SPACE}{weights}-{dtype}-k{layout.num_drafts}-{rest}"
