"""A folder for an engine's caches where its own cannot be written: a home that is read-only."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile


def instead_of(own: str, name: str) -> str | None:
    """The user's temporary folder of this name if `own` cannot be written; else None.

    Also None if that cannot be written either, or others could write it and so plant compiled code.
    """
    if _writable(Path(own)):
        return None
    folder = Path(os.environ.get("TMPDIR") or "/tmp", f"{name}-{os.getuid()}")
    return str(folder) if _writable(folder) and _private(folder) else None


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
