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

BLOCK = 4096  # bytes; reads begin at multiples of it, in the file and in memory, as O_DIRECT asks
PIECE = 16 << 20  # bytes that one thread reads at a time
THREADS = 4  # the fewest: a disk is faster with several reads under way


def read(place: Place, *, shared: bool = False) -> Tensor:
    """A tensor in memory, in huge pages if torch has them.

    Copied from a mapped file, each page of 4 KiB is a fault, and resident twice. Files that do not
    fit into memory beside their weights are read past Linux's page cache (O_DIRECT): it would push
    out what other programs need, and hold little of them at the next start.

    Args: shared: other processes read the same tensor at the same time, through the page cache.

    Raises: CheckpointError for a file that is cut short.
    """
    dtype, nbytes = _size(place)
    before = place.offset % BLOCK  # bytes of the tensor's first block
    end = before + nbytes
    blocks = torch.empty(end + 2 * BLOCK, dtype=torch.uint8)
    aligned = -blocks.data_ptr() % BLOCK
    view = blocks.numpy().data[aligned:]
    threads = max(THREADS, torch.get_num_threads())

    def fill(start: int) -> None:
        stop = min(start + PIECE, end)
        while start < stop:
            into = view[start : -(-stop // BLOCK) * BLOCK]
            start += (got := os.preadv(file, [into], place.offset - before + start))
            if not got or (got % BLOCK and start < stop):
                raise CheckpointError(f"{place.path} is truncated, download it again")

    past_cache = not shared and _outgrows(place.path.parent)
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
    """A descriptor to read a file by; past the page cache where the file system can."""
    file = None
    if past_cache and hasattr(os, "O_DIRECT"):
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    file = os.open(path, os.O_RDONLY) if file is None else file
    try:
        yield file
    finally:
        os.close(file)


@cache
def _outgrows(folder: Path) -> bool:
    """Whether a checkpoint's files do not fit into memory beside its weights."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return 2 * total > os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


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
