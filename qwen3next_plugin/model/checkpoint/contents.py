"""The tensors of a checkpoint's files: read by several threads into memory, or mapped."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import STORED_DTYPES
from qwen3next_plugin.model.checkpoint.headers import Place

# Direct reads begin and end at multiples of it, in the file and in memory. Whole memory pages,
# because a page that the disk writes must have nothing else in it when the process forks.
BLOCK = max(4096, mmap.PAGESIZE)
PIECE = 16 << 20  # bytes that one thread reads at a time
THREADS = 4  # the fewest: a disk is faster with several reads under way


def read(place: Place, *, past_cache: bool = False) -> Tensor:
    """A tensor in memory, in huge pages if torch has them.

    Copied from a mapped file, each page of 4 KiB is a fault, and resident twice.

    Args: past_cache: leave the page cache to others, if the file system can read past it.

    Raises: CheckpointError for a file that is cut short.
    """
    dtype, nbytes = _size(place)
    before = place.offset % BLOCK  # bytes of the first block that precede the tensor
    first, end = place.offset - before, before + nbytes
    blocks = torch.empty(end + 2 * BLOCK, dtype=torch.uint8)
    aligned = -blocks.data_ptr() % BLOCK
    view = blocks.numpy().data[aligned:]
    threads = max(THREADS, torch.get_num_threads())

    def fill(start: int) -> None:
        stop = min(start + PIECE, end)
        while start < stop:
            into = view[start : -(-stop // BLOCK) * BLOCK]
            start += (got := os.preadv(file, [into], first + start))
            if start < stop:
                if got < BLOCK:
                    raise CheckpointError(f"{place.path} is truncated, download it again")
                start -= got % BLOCK

    with _opened(place.path, past_cache=past_cache) as file:
        pieces = range(0, end, PIECE)
        if len(pieces) > 1:
            with ThreadPoolExecutor(threads, initializer=_on_all_cores) as pool:
                [*pool.map(fill, pieces)]
        else:
            fill(0)
    data = blocks[aligned:][before:end]
    if place.offset % dtype.itemsize:  # torch takes no value from between its own multiples
        data = data.clone()
    return data.view(dtype).view(place.header.shape)


@contextmanager
def _opened(path: Path, *, past_cache: bool) -> Iterator[int]:
    """A descriptor to read a file by."""
    file = _direct(path) if past_cache else None
    file = os.open(path, os.O_RDONLY) if file is None else file
    try:
        yield file
    finally:
        os.close(file)


def _direct(path: Path) -> int | None:
    """A descriptor to read past the page cache by; None where the file system cannot."""
    if not hasattr(os, "O_DIRECT"):
        return None
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(file, [mmap.mmap(-1, BLOCK)], 0)  # some refuse only the reads
        except OSError:
            os.close(file)
        else:
            return file
    return None


def mapped(place: Place) -> Tensor:
    """A tensor that is a part of the mapped file."""
    dtype, nbytes = _size(place)
    data = _mapping(place.path)[place.offset : place.offset + nbytes]
    return data.view(dtype).view(place.header.shape)


@cache
def _mapping(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def _size(place: Place) -> tuple[torch.dtype, int]:
    dtype = STORED_DTYPES[place.header.dtype]
    return dtype, prod(place.header.shape) * dtype.itemsize


def _on_all_cores() -> None:
    """Run on every core of this process: a new thread inherits those of its parent."""
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it ended meanwhile
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
