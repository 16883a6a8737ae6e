"""The adapters that flags name, before anything is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.extras.adapters.low_rank import AdapterError, check_stored


def check_adapters(server_args: Any) -> None:
    """Refuse a folder's adapter that has another shape, or would be ignored in part.

    Raises:
        ConfigError: names the tensor or setting, and the fix.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of

    if not (folders := list(_folders(server_args.lora_paths))):
        return
    config = read_config(model_config_of(server_args).hf_config, server_args.tp_size)
    for folder in folders:
        try:
            check_stored(folder, config)
        except AdapterError as error:
            raise ConfigError(f"--lora-paths {folder}: {error}") from error


def _folders(lora_paths: Any) -> Iterator[Path]:
    """Those that --lora-paths names; an adapter of a hub is checked as it loads."""
    given = lora_paths.values() if isinstance(lora_paths, dict) else lora_paths or ()
    for one in given:
        if isinstance(one, dict):
            path = one["lora_path"]
        else:
            path = one.partition("=")[2] or one if isinstance(one, str) else one.lora_path
        if Path(path).is_dir():
            yield Path(path)
