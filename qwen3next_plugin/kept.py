"""Files for this user alone, and what is kept in some between starts; imports no torch."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

OF_FILE, OF_FOLDER = 0o600, 0o700  # modes, whatever the umask
WRITABLE = 0o022  # by the group, or by all

# What may go wrong where nothing can be kept; RuntimeError: there is no home.
NOT_KEPT = (OSError, RuntimeError)


def is_own(found: os.stat_result) -> bool:
    """Whether only this user, and root, can write there."""
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & WRITABLE


def make_folder(folder: Path) -> None:
    """Make a folder, and its parents, for this user alone; what is there stays as it is."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):  # another process has just made it
        folder.mkdir(OF_FOLDER)
        folder.chmod(OF_FOLDER)


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, or an emptied one; follows no link."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, OF_FILE)
    with suppress(OSError):  # a file system without modes
        os.fchmod(handle, OF_FILE)
    return open(handle, "wb")


def keep(name: str, found: Any) -> None:
    """Write a value as JSON. Where nothing can be written, the next start finds it out again."""
    with suppress(*NOT_KEPT):
        path = _folder() / f"{name}.json"
        make_folder(path.parent)
        part = path.with_suffix(f".{os.getpid()}")
        with create(part) as file:
            file.write(json.dumps(found).encode())
        part.replace(path)


def kept(name: str) -> Any:
    """What was written under a name; None: nothing, or what another user may have written."""
    with suppress(*NOT_KEPT, ValueError):
        return _read(_folder() / f"{name}.json")
    return None


def all_kept(folder: str) -> Iterator[Any]:
    """What was written under the names of a folder; what cannot be read is skipped."""
    with suppress(*NOT_KEPT):
        for path in (_folder() / folder).glob("*.json"):
            with suppress(OSError, ValueError, RecursionError):
                yield _read(path)


@contextmanager
def one_at_a_time(name: str, wait: Callable[[], object]) -> Iterator[None]:
    """Let one process of this user after another do this; calls `wait` if another does.

    Where nothing can be written, all do it at once.
    """
    with ExitStack() as opened:
        with suppress(*NOT_KEPT):
            path = _folder() / f"{name}.lock"
            make_folder(path.parent)
            file = opened.enter_context(create(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Any:
    found = path.stat()
    if not S_ISREG(found.st_mode) or not is_own(found):
        raise ValueError(f"{path} is not this user's own file")
    return json.loads(path.read_bytes())


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "qwen3next_plugin"
