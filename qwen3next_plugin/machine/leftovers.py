"""Files in /dev/shm of servers that were killed."""

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path
from time import time

SHARED_MEMORY = Path("/dev/shm")
SECONDS = 2  # a newer file may not have been opened by its users yet


def remove_dead(pattern: str) -> list[Path]:
    """Remove files that match a pattern and that no process has open or mapped; returns them."""
    removed = []
    for path in SHARED_MEMORY.glob(pattern):
        with suppress(OSError):  # another user's, or it has just been removed
            if time() - path.stat().st_ctime > SECONDS and _remove_if_dead(path):
                removed.append(path)
    return removed


def _remove_if_dead(path: Path) -> bool:
    """Remove a file that no process uses, in any container.

    Linux grants a write lease only while no other process has a file open or mapped, and an
    `open` waits until the lease ends.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # sent by a waiting `open`; ignored
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        path.unlink()
        return True
    finally:
        os.close(file)
