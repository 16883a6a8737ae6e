"""Returns memory to the system: that of mapped checkpoint files, and what malloc has freed."""

import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MADV_PAGEOUT = 21  # linux/mman.h; kernels before 5.4 refuse it, and no memory is reclaimed
AROUND = 1 << 16  # Linux's fault_around_bytes: it maps the aligned range around a page it reads
# Bytes to give back at once: to give back less, Linux would split a cached file's large page.
RUN = 4 << 20
MOST_RUNS = 8  # growing at once: files are sorted by dtype, so a module's tensors are apart
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
OF_MALLOC = re.compile(r"MALLOC_(TRIM|MMAP)_THRESHOLD_=|GLIBC_TUNABLES=.*glibc\.malloc\.")
KEPT = 1 << 30  # most bytes of freed memory to keep, and of a tensor whose memory is kept
TENSOR_OF_OLDER = 32 << 20  # for an older glibc, which refuses more


@contextmanager
def giving_back() -> Iterator[Callable[[torch.Tensor], None]]:
    """Let the system reclaim the memory of tensors that were read, if they are of mapped files.

    Without this, every page that was copied from a mapped checkpoint stays resident, and loading
    peaks at twice the size of the weights. It is only a hint: data that is still needed is read
    again. With a GPU it does nothing, because host memory is not short there, and the ranks of a
    machine read the same pages.

    Yields: a function to call with each tensor that was read. Tensors side by side are given back
    together.
    """
    # The end of what was read → its start, and a tensor, which keeps the file mapped.
    runs: dict[int, tuple[int, torch.Tensor]] = {}
    wanted = sys.platform.startswith("linux") and not torch.accelerator.is_available()

    def done(tensor: torch.Tensor) -> None:
        if not wanted or tensor.device.type != "cpu":
            return
        end = tensor.data_ptr() + tensor.nbytes
        start, _ = runs.pop(tensor.data_ptr(), (tensor.data_ptr(), tensor))
        if end - start >= RUN:
            _give_back(start, end)
            return
        runs[end] = start, tensor
        if len(runs) > MOST_RUNS:
            oldest = next(iter(runs))
            _give_back(runs.pop(oldest)[0], oldest)

    try:
        yield done
    finally:
        for end, (start, _) in runs.items():
            _give_back(start, end)


def read_at_random(tensor: torch.Tensor) -> None:
    """Turn off read-ahead for this tensor in its mapped file: its rows are read at random."""
    if not sys.platform.startswith("linux") or not tensor.nbytes:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, tensor.data_ptr() + tensor.nbytes, mmap.MADV_RANDOM)


def drop(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that is not read again, but none of its neighbours'."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, end, mmap.MADV_DONTNEED)


def give_back_freed() -> None:
    """Let the system reclaim freed memory that malloc keeps.

    An aligned tensor does not fit into the gap of a freed one of the same size. Packing one weight
    after another would leave gaps of a fifth to a third of their size.
    """
    if sys.platform.startswith("linux") and hasattr(_libc(), "malloc_trim"):  # of glibc
        _libc().malloc_trim(ctypes.c_size_t(0))


def keep_freed() -> None:
    """Let malloc keep up to 1 GiB of what is freed from now on.

    By default glibc returns blocks from 32 MB on to Linux, and a step of many tokens frees larger
    ones at each op: a prompt of 2,048 tokens met 56,000 page faults, and took 1.10 times as long.
    Call it after loading and warming up, because their memory must still be given back. Does
    nothing if the user has set malloc's thresholds.
    """
    is_glibc = sys.platform.startswith("linux") and hasattr(_libc(), "mallopt")
    if not is_glibc or any(OF_MALLOC.match(f"{k}={v}") for k, v in os.environ.items()):
        return
    if not _libc().mallopt(M_MMAP_THRESHOLD, KEPT):
        _libc().mallopt(M_MMAP_THRESHOLD, TENSOR_OF_OLDER)
    _libc().mallopt(M_TRIM_THRESHOLD, KEPT)


def _give_back(start: int, end: int) -> None:
    """Give back the memory from `start` to `end`, which was read."""
    # Reading the first page has also mapped up to AROUND bytes before it again.
    _advise(start // AROUND * AROUND, end // mmap.PAGESIZE * mmap.PAGESIZE, MADV_PAGEOUT)


def _advise(start: int, end: int, advice: int) -> None:
    """Tell Linux how pages from `start` to `end` are used. Its answer is not needed."""
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
