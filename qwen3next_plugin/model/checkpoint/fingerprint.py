"""Which weights are in a checkpoint's files: a digest of all their bytes.

Hashes are cached per user: a file is read again only if it has changed.
"""

import os
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from threading import Event
from typing import Any

from qwen3next_plugin.kept import keep, kept, one_at_a_time
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.contents import THREADS, on_all_cores
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files

KEPT = "hashes"
PIECE = 1 << 20  # bytes that a thread reads at a time
SETTLED = 2_000_000_000  # ns; two writes within this may leave a file with the same time
State = tuple[str, int, int]

_known: dict[str, Any] = {}  # file → its state when it was hashed, and its hash


def fingerprint(folder: Path, say: progress.Say) -> str:
    """A digest of each weight file's name and contents; a copy has the same one.

    Args: say: takes lines of the log while files are read.

    Raises:
        CheckpointError: there are no such files, or one is written meanwhile.
    """
    files = weight_files(folder, read_index(folder))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files, by which weights are known")
    lines = (os.fsencode(f"{of}  {name}\n") for name, of in hashes(files, say).items())
    return sha256(b"".join(lines)).hexdigest()[:16]


def states(files: Iterable[Path]) -> list[State]:
    """Each file's name, size and time of change, which tell whether it was written since."""
    found = ((file.name, file.stat()) for file in files)
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def hashes(files: Iterable[Path], say: progress.Say) -> dict[str, str]:
    """Each file's name and SHA-256; if several processes need them, only the first computes them.

    Raises:
        CheckpointError: a file is written meanwhile.
    """
    real = {file.name: os.path.realpath(file) for file in files}  # a hub's folder has links
    found = _look_up(real.values())
    if any(file not in found for file in real.values()):
        waiting = partial(say, "waiting for another process that hashes weights")
        with one_at_a_time(KEPT, waiting):
            found = _look_up(real.values())
            found |= _compute({*real.values()} - found.keys(), say)
            keep(KEPT, {file: known for file, known in _known.items() if os.path.exists(file)})
    return {name: found[file] for name, file in real.items()}


def _look_up(files: Iterable[str]) -> dict[str, str]:
    """The known hashes of those files that have not changed."""
    if isinstance(earlier := kept(KEPT), dict):
        _known.update(earlier)
    found = {}
    for file in files:
        match _known.get(file):
            case [[*state], str(of)] if state == _state(os.stat(file)):
                found[file] = of
    return found


def _compute(files: Collection[str], say: progress.Say) -> dict[str, str]:
    """Hash whole files on all cores, and remember the hashes."""
    if not files:
        return {}
    order = sorted(files, key=os.path.getsize, reverse=True)  # so that no large one is last
    total = sum(map(os.path.getsize, files))
    progress.begin(lambda: total, say, "hashing weights")
    pool = ThreadPoolExecutor(max(THREADS, os.cpu_count() or 1), initializer=on_all_cores)
    stopped = Event()
    try:
        found = dict(pool.map(partial(_hash, stopped), order))
    except BaseException:
        progress.cancel()
        raise
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    progress.finish("hashed")
    return found


def _hash(stopped: Event, path: str) -> tuple[str, str]:
    """A file and its SHA-256, which is remembered."""
    hashed, piece = sha256(), memoryview(bytearray(PIECE))
    began = time.time_ns()
    before = os.stat(path)
    if not S_ISREG(before.st_mode):
        raise CheckpointError(f"{path} is no file; download it again")
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(piece):
            if stopped.is_set():
                raise CheckpointError(f"{path} was not read to its end")
            hashed.update(piece[:got])
            progress.advance(got)
    if _state(os.stat(path)) != _state(before):
        raise CheckpointError(f"{path} was written while it was read; start again when it is whole")
    if began - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED:
        _known[path] = [_state(before), hashed.hexdigest()]
    return path, hashed.hexdigest()


def _state(found: os.stat_result) -> list[int]:
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
