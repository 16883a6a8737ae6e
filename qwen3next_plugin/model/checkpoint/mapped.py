"""Gives memory back to the system: that of mapped checkpoint files, and what malloc keeps."""

import ctypes
import functools
import mmap
import sys

import torch

MADV_PAGEOUT = 21  # linux/mman.h; kernels before 5.4 refuse it, and no memory is reclaimed
AROUND = 1 << 16  # Linux's fault_around_bytes: it maps the aligned range around a page it reads


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
    # Reading the first page has mapped the end of the tensor before it again, up to AROUND bytes.
    start = tensor.data_ptr() // AROUND * AROUND
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, end, MADV_PAGEOUT)


def read_at_random(tensor: torch.Tensor) -> None:
    """Keep Linux from reading ahead in a mapped file where this tensor is: its rows are apart."""
    if not sys.platform.startswith("linux") or not tensor.nbytes:
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, tensor.data_ptr() + tensor.nbytes, mmap.MADV_RANDOM)


def drop(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that is not read again; that of tensors beside it stays."""
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


def _advise(start: int, end: int, advice: int) -> None:
    """Tell Linux how pages from `start` to `end` are used. Its answer is not needed."""
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
