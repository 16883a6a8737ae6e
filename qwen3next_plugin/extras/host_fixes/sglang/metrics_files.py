"""Refuses a folder too full for metrics, which SGLang's processes map as sparse 1 MiB files."""

import os
import shutil
import tempfile
from typing import Any

from qwen3next_plugin.config.errors import ConfigError

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ROOM = 16 << 20  # three processes with five files each; a rank more writes far less than all of it


def check_room(server_args: Any) -> None:
    """Check that metrics have room: on a full disk, writing to a mapped page is a SIGBUS.

    Raises:
        ConfigError: names the folder.
    """
    folder = os.environ.get(FOLDER) or tempfile.gettempdir()
    if not server_args.enable_metrics:
        return
    if not os.path.isdir(folder):
        raise ConfigError(f"--enable-metrics: {FOLDER}={folder} is no folder; make it, or unset it")
    if (free := shutil.disk_usage(folder).free) < ROOM:
        raise ConfigError(
            f"--enable-metrics: {folder} has {free >> 10} KiB left, and SGLang's processes would "
            f"end when they write their metrics there; free {ROOM >> 20} MiB, or set {FOLDER} to a "
            f"folder with room"
        )
