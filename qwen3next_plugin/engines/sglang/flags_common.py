"""What is refused before a worker starts; the platform calls this while SGLang completes flags."""

from collections import deque
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.sglang.flags import check_flags, read_config
from qwen3next_plugin.kernels.gpu.configs import architecture
from qwen3next_plugin.model.weights import check_files, checked, stored_tensors, trunk_tensors
from qwen3next_plugin.mtp.weights import mtp_tensors, require_mtp


def check(server_args: Any, model_config: Any, *, on_cpu: bool) -> None:
    """Refuse flags, a model or its files by name.

    Raises:
        ConfigError, CheckpointError: naming the thing and the mend.
    """
    check_flags(server_args, on_cpu=on_cpu)
    hf_config = model_config.hf_config
    quantised = bool(getattr(hf_config, "quantization_config", None))
    if quantised and on_cpu:
        raise ConfigError(
            "quantization_config: there are no quantised kernels for a CPU here; serve the "
            "released checkpoint, Qwen/Qwen3-Next-80B-A3B-Instruct, or another in bfloat16"
        )
    config = read_config(hf_config, server_args.tp_size)
    folder = Path(server_args.model_path)
    if folder.is_dir() and server_args.load_format != "dummy":
        drafts = bool(server_args.speculative_algorithm)
        _check_checkpoint(folder, config, drafts=drafts, quantised=quantised)


def check_architecture() -> None:
    """Refuse a GPU that no kernel is built for, before weights are loaded onto it.

    Raises: NotImplementedError: naming the GPU's architecture and those that there are.
    """
    if env.kernels() != "reference":
        architecture(torch.device("cuda"))


def _check_checkpoint(
    folder: Path, config: Qwen3NextConfig, *, drafts: bool, quantised: bool
) -> None:
    """Every tensor is there, in its shape; what a hub's checkpoint lacks shows as it loads."""
    check_files(folder)
    trunk, mtp = trunk_tensors(config), mtp_tensors(config)
    stored = stored_tensors(folder)
    deque(checked(stored, expected=trunk, ignored=mtp, quantised=quantised), maxlen=0)
    if drafts:
        stored = require_mtp(stored_tensors(folder))
        deque(checked(stored, expected=mtp, ignored=trunk, quantised=quantised), maxlen=0)
