"""Memory as the system maps it: what is given back to it, and the size of a weight's pages."""

import ctypes
import functools
import mmap
import sys
from pathlib import Path

import torch

# linux/mman.h. A kernel that does not know an advice refuses it, and nothing changes.
MADV_HUGEPAGE = 14
MADV_PAGEOUT = 21  # from 5.4 on
MADV_COLLAPSE = 25  # from 6.1 on
AROUND = 1 << 16  # bytes that Linux maps around one that is read (fault_around_bytes), aligned
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def give_back(tensor: torch.Tensor) -> None:
    """Let the system reclaim a tensor's memory after it was read, if it is a mapped file.

    A checkpoint is mapped into memory: without this, every page that was copied from it stays
    resident, and loading peaks at twice the size of the weights. It is only a hint: data that is
    still needed stays or is read again, in any kind of memory. With a GPU it does nothing: memory
    is not short there, and the ranks of a machine read the same pages.
    """
    on_gpu = torch.accelerator.is_available()
    if tensor.device.type != "cpu" or on_gpu or not sys.platform.startswith("linux"):
        return
    # With its first pages come back the last ones of the tensor before it, which was read before.
    start = tensor.data_ptr() // AROUND * AROUND
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _advise(start, end, MADV_PAGEOUT)


def give_back_freed() -> None:
    """Let the system reclaim what was freed and malloc keeps.

    A freed tensor leaves a gap that one of the same size, aligned, does not fit in. Packing all
    weights, one after another, would leave a fifth to a third of their size as such gaps.
    """
    if sys.platform.startswith("linux") and hasattr(_libc(), "malloc_trim"):  # of glibc
        _libc().malloc_trim(ctypes.c_size_t(0))


def use_large_pages(tensor: torch.Tensor) -> None:
    """Move a tensor's memory to pages of 2 MB, as far as the system has any.

    A step reads each weight once, and no cache holds them all. In pages of 4 KB, which is what most
    systems give unless they are asked, the processor waits for addresses as long as for the
    weights. Values stay as they are, and so does the memory that is taken.
    """
    page = _large_page()
    if not page or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):
        _advise(start, end, advice)


@functools.cache
def _large_page() -> int:
    """Bytes of a large page; 0 if the system has none, or its owner wants none."""
    try:
        never = "[never]" in (LARGE_PAGES / "enabled").read_text()
        return 0 if never else int((LARGE_PAGES / "hpage_pmd_size").read_text())
    except OSError:
        return 0


def _advise(start: int, end: int, advice: int) -> None:
    """Advise the system about the memory between two addresses; what it refuses is left."""
    if end > start:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
