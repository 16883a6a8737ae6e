"""Cached blocks in files of one folder: checked as they are read, the oldest removed at a limit.

Several servers of one user may share the folder. Files appear atomically. A file with other content
than was written under its name is removed and never used.
"""

import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from shlex import quote
from stat import S_ISREG
from tempfile import TemporaryFile
from time import time
from typing import Any, NamedTuple
from zlib import crc32

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.kept import OF_FILE, OF_FOLDER, create, is_own, make_folder

# Prefix of our subfolders, with the format's number; nothing else in the folder is touched.
SPACE = "qwen3next-1-"
PART = ".part"  # the ending of a file that is being written
PART_SECONDS = 600  # age from which it is abandoned
HEADER = struct.Struct("<32sQI")  # digest of the name, bytes of the content, and its checksum
CUT, EVERY = "00", 256  # on average a piece ends after one in 256 keys
SHARE = 8  # 1/SHARE of the limit is written between counts, and removed beyond the excess


class File(NamedTuple):
    """A file on disk."""

    used: float  # when it was last read or written
    nbytes: int
    path: Path


class BlockFiles:
    """Files in subfolders of a folder; those of all servers take at most about `limit` bytes.

    Each server counts all files again when it has written an eighth of the limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.part = f".{token_hex(4)}{PART}"
        for file in self._files():
            if file.path.suffix == PART and time() - file.used > PART_SECONDS:
                with suppress(OSError):  # it is another user's, or has just been removed
                    file.path.unlink()  # of a server that was killed
        self.uncounted = 0  # bytes written since all files were counted

    def nbytes(self, name: str) -> int:
        """Bytes of a file's content, from the file's size; -1: there is no such file."""
        try:
            return max(-1, (self.folder / name).stat().st_size - HEADER.size)
        except OSError:
            return -1

    def holds(self, name: str, nbytes: int) -> bool:
        """Whether a file of this name and number of content bytes exists."""
        return self.nbytes(name) == nbytes

    def use(self, name: str) -> None:
        """Mark a file, if it exists, as the most recently used."""
        with suppress(OSError):
            os.utime(self.folder / name)

    def read(self, name: str, content_: memoryview) -> bool:
        """Fill `content_` from a file; if it is damaged, remove it and return False.

        Also if others can write to it, because a checksum does not prove that content is ours.
        """
        path = self.folder / name
        header = bytearray(HEADER.size)
        try:
            with path.open("rb") as file:
                trusted = is_own(os.fstat(file.fileno()))
                found = file.readinto(header) + file.readinto(content_) + len(file.read(1))
        except OSError:
            return False
        whole = found == HEADER.size + len(content_) and header == _header(name, content_)
        if not (whole and trusted):
            with suppress(OSError):
                path.unlink()
            return False
        self.use(name)
        return True

    def write(self, name: str, content: memoryview) -> None:
        """Write a file, unless it is there; remove the oldest ones beyond the limit.

        Raises:
            OSError: it cannot be written. If the disk or a quota is full, the oldest files are
                removed to make room for later ones.
        """
        if self.holds(name, len(content)):
            self.use(name)
            return
        path = self.folder / name
        part = path.with_name(path.name + self.part)
        try:
            make_folder(path.parent)
            with create(part) as file:
                file.write(_header(name, content))
                file.write(content)
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            if error.errno in (ENOSPC, EDQUOT):
                self._remove_oldest(SHARE * len(content))
            raise
        self.uncounted += HEADER.size + len(content)
        if self.uncounted > self.limit // SHARE:
            self._remove_oldest()

    def _remove_oldest(self, room: int = 0) -> None:
        """Count all files; remove the oldest to free `room` bytes, or a share of the limit."""
        files = sorted(self._files())
        beyond = max(room, sum(file.nbytes for file in files) + self.limit // SHARE - self.limit)
        for file in files:
            if beyond <= 0:
                break
            with suppress(OSError):
                file.path.unlink()
            beyond -= file.nbytes
        self.uncounted = 0

    def _files(self) -> Iterator[File]:
        for path in self.folder.glob(f"{SPACE}*/*/*"):
            with suppress(OSError):
                found = path.lstat()
                if S_ISREG(found.st_mode):
                    yield File(found.st_mtime, found.st_size, path)


def writer() -> ThreadPoolExecutor:
    """One thread for work that nobody waits for, at the lowest priority."""

    def give_way() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, 19)  # of this thread alone

    return ThreadPoolExecutor(1, "folder-write", give_way)


def check_settings(
    settings: Mapping[str, Any], numbers: Sequence[str], where: str, warn: Callable[[str], object]
) -> None:
    """Make the folder; refuse one that cannot be written, and invalid numbers of bytes.

    Args:
        where: name of the field with the settings.
        warn: called with a line for the log if others can write to the folder.

    Raises:
        ConfigError: names the setting and the fix.
    """
    for name in numbers:
        value = settings.get(name)
        if value is None:
            raise ConfigError(f"{name} is missing in {where}: a number of bytes")
        if not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{name} = {value!r}: must be a number of bytes, in {where}")
    folder = settings.get("folder")
    if isinstance(folder, str) and Path(folder).parent.is_dir():
        with suppress(OSError):  # it is there, or cannot be made
            Path(folder).mkdir(mode=0o700)
    if not isinstance(folder, str) or not Path(folder).is_dir():
        raise ConfigError(f"folder = {folder!r}: no such folder; make it, or change {where}")
    try:
        with TemporaryFile(dir=folder) as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"folder = {folder!r} cannot be written ({error.strerror}): grant user {os.getuid()} "
            f"that, or name another in {where}"
        ) from error
    if not is_own(found):
        raise ConfigError(
            f"folder = {folder!r}: its disk lets others write to a file of user {os.geteuid()} "
            f"(owner {found.st_uid}, mode {found.st_mode & 0o777:o}); name another in {where}"
        )
    _close_to_others(Path(folder), warn)


def _close_to_others(folder: Path, warn: Callable[[str], object]) -> None:
    """Make files of servers unreadable for other users; warn if others can write there."""
    if not is_own(folder.stat()):  # links of theirs may be there, so no mode is changed
        path = quote(str(folder))
        warn(
            f"qwen3next_plugin: others can write to {folder}, so they can remove what is kept "
            f"there: chown {os.geteuid()} {path} && chmod 700 {path}"
        )
        return
    for space in folder.glob(f"{SPACE}*"):
        for top, _, names in os.walk(space):
            for path, mode in ((top, OF_FOLDER), *((f"{top}/{name}", OF_FILE) for name in names)):
                with suppress(OSError):  # it is another user's, or has just been removed
                    os.chmod(path, mode)


def pieces(keys: Sequence[str], ends: Collection[int] = ()) -> Iterator[tuple[int, int]]:
    """Begin and end of a prefix's files, which end with it and after keys that begin with CUT.

    A key is a digest of a token and all before it, so prefixes that share tokens share files.
    `ends` are the ends of shorter prefixes; their last files are included.
    """
    begin = 0
    for end, key in enumerate(keys, 1):
        is_cut = key.startswith(CUT)
        if is_cut or end in ends or end == len(keys):
            yield begin, end
        if is_cut:
            begin = end


def least_limit(count: int, nbytes: int) -> int:
    """The smallest limit that always keeps the newest `count` files of `nbytes` content each."""
    return -(-count * (HEADER.size + nbytes) * SHARE // (SHARE - 1))


def _header(name: str, content: memoryview) -> bytes:
    return HEADER.pack(sha256(name.encode()).digest(), len(content), crc32(content))
