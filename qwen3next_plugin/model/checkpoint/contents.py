"""The tensors of a checkpoint's files: read by several threads into memory, or mapped."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import STORED_DTYPES
from qwen3next_plugin.model.checkpoint.headers import Place

PIECE = 16 << 20  # bytes that one thread reads at a time
THREADS = 4  # minimum: a disk is faster with several reads in flight


def read(place: Place) -> Tensor:
    """A tensor in memory, in huge pages if torch has them.

    Copying it from a mapped file would fault on each page of 4 KiB, and keep it resident twice.
    """
    dtype, nbytes = _size(place)
    out = torch.empty(nbytes, dtype=torch.uint8)
    view = out.numpy().data

    def fill(start: int) -> None:
        stop = min(start + PIECE, nbytes)
        while start < stop:
            if not (got := os.preadv(file.fileno(), [view[start:stop]], place.offset + start)):
                raise CheckpointError(f"{place.path} is truncated, download it again")
            start += got

    with place.path.open("rb", buffering=0) as file:
        pieces = range(0, nbytes, PIECE)
        if len(pieces) > 1:
            threads = max(THREADS, torch.get_num_threads())
            with ThreadPoolExecutor(threads, initializer=on_all_cores) as pool:
                [*pool.map(fill, pieces)]
        elif nbytes:
            fill(0)
    return out.view(dtype).view(place.header.shape)


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


def on_all_cores() -> None:
    """Let this thread run on all cores of the process, not only its parent thread's."""
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it ended meanwhile
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)
