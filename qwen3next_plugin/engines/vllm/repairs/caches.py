"""A folder for vLLM's caches where the home cannot be written."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile

from vllm import envs
from vllm.logger import init_logger

from qwen3next_plugin.engines.vllm.names import LOGGER

logger = init_logger(LOGGER)

ROOT = "VLLM_CACHE_ROOT"


def provide_folder() -> None:
    """Let vLLM use a temporary folder if it cannot write its own: without one it compiles nothing.

    A folder that the user names stays. Others must not be able to write the temporary one, because
    compiled graphs are programs. Remove when vLLM compiles without a folder.
    """
    own = Path(envs.VLLM_CACHE_ROOT)
    if ROOT in os.environ or _writable(own):
        return
    folder = Path(os.environ.get("TMPDIR") or "/tmp", f"vllm-{os.getuid()}")
    if _writable(folder) and _private(folder):
        os.environ[ROOT] = str(folder)
        logger.warning(
            "%s cannot be written: vLLM's caches are in %s; %s names another folder",
            *(own, folder, ROOT),
        )


def _writable(folder: Path) -> bool:
    """Whether files can be written there; makes the folder."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            return file.write(b"1") == 1
    except OSError:
        return False


def _private(folder: Path) -> bool:
    found = folder.lstat()
    shared = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & shared
    )
