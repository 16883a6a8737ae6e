"""Gives memory back to the system: that of mapped checkpoint files, and what malloc keeps."""

import ctypes
import functools
import mmap
import sys

import torch

MADV_RANDOM = 1  # linux/mman.h, also the next
MADV_DONTNEED = 4
MADV_PAGEOUT = 21  # linux/mman.h; kernels before 5.4 refuse it, and no memory is reclaimed
AROUND = 1 << 16  # bytes that Linux maps around one that is read (fault_around_bytes), aligned


def give_back(tensor: torch.Tensor) -> None:
    """Let the system reclaim a tensor's memory after it was read, if it is a mapped file.

    Without this, every page that was copied from a mapped checkpoint stays resident, and loading
    peaks at twice the size of the weights. It is only a hint: data that is still needed is read
    again. With a GPU it does nothing, because host memory is not short there, and the ranks of a
    machine read the same pages.
    """
    on_gpu = torch.accelerator.is_available()
    if tensor.device.type != "cpu" or on_gpu or not sys.platform.startswith("linux"):
        return
    # Reading a first page maps up to AROUND bytes before it again: the end of the last tensor.
    start = tensor.data_ptr() // AROUND * AROUND
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def read_at_random(tensor: torch.Tensor) -> None:
    """Keep Linux from reading ahead in a mapped file where this tensor is: its rows are apart."""
    if not sys.platform.startswith("linux") or not tensor.nbytes:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_RANDOM)


def drop(tensor: torch.Tensor) -> None:
    """Give back a tensor's memory, whose values are not read again; others' beside it is kept."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def give_back_freed() -> None:
    """Let the system reclaim freed memory that malloc keeps.

    An aligned tensor does not fit into the gap of a freed one of the same size. Packing one weight
    after another would leave gaps of a fifth to a third of their size.
    """
    if sys.platform.startswith("linux") and hasattr(_libc(), "malloc_trim"):  # of glibc
        _libc().malloc_trim(ctypes.c_size_t(0))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
