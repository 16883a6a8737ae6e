"""How much memory a rank uses for states and KV, and weights that no memory can hold."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.hub import folder_here
from qwen3next_plugin.machine.cgroups import memory_bytes, memory_left, swap_limit
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files
from qwen3next_plugin.model.checkpoint.sizes import rank_bytes, without_mtp
from qwen3next_plugin.model.checkpoint.units import readable

MEMINFO = Path("/proc/meminfo")
LEAST_POOLS = 2 << 30  # least bytes for states and KV where mapped weights take the rest
SHARE = 4  # by default states and KV take 1/SHARE of what is free
REST = 1 << 30  # bytes that a rank keeps free for activations and buffers
PROCESSES = 1 << 30  # bytes of the processes that an engine starts for a rank


class Share(TypedDict):
    """What one of the ranks that start together on a machine may use."""

    memory: int  # bytes for weights, states and KV
    threads: int
    mapped: int  # bytes of weights that stay in files


def free_bytes() -> int:
    """Free bytes of this machine and this process's cgroups, with file cache that can be dropped.

    Files in /dev/shm cannot be dropped.
    """
    return max(0, int(min(_meminfo("MemAvailable"), memory_left())))


def granted(free: int, ranks: int = 1, pinned: int = 0) -> int:
    """Bytes that each of this machine's ranks may use for weights, states and KV.

    Args:
        free: bytes, before any rank starts.
        ranks: those of all engines that start now.
        pinned: bytes that all ranks together will take for something else.
    """
    return max(0, (free - pinned) // max(1, ranks) - REST - PROCESSES)


def share_of(ranks: int, mapped: int, pinned: int = 0) -> Share:
    """The share of each rank, before any of them starts.

    Args:
        mapped, pinned: bytes of all ranks together; see `mapped_bytes` and `granted`.
    """
    return {
        "memory": granted(free_bytes(), ranks, pinned),
        "threads": max(1, len(os.sched_getaffinity(0)) // ranks),
        "mapped": mapped // ranks,
    }


def room(left: int, mapped: int) -> int:
    """The most bytes for states and KV, out of those left by the weights in memory.

    Mapped weights keep their place in the page cache, as long as LEAST_POOLS remain.
    """
    return max(0, left - mapped, min(left, LEAST_POOLS) if mapped else 0)


def default_pools(most: int, request: int) -> int:
    """Bytes for states and KV: a share of what is free, and at least a request of full length.

    At most `most`, which is in bytes and from `room`; `request`: bytes of such a request.
    """
    return min(most, max(most // SHARE, request))


def mapped_bytes(model: str, revision: str | None = None, downloads: str | None = None) -> int:
    """Bytes of files that QWEN3NEXT_MMAP keeps mapped; engines do not count their pages."""
    if not env.mmap() or (folder := folder_here(model, revision, downloads)) is None:
        return 0
    return sum(file.stat().st_size for file in weight_files(folder, read_index(folder)))


def check_weights(sizes: Mapping[str, int], config: Qwen3NextConfig, ranks: int) -> None:
    """Refuse a model whose weights alone are larger than memory and swap together.

    Args:
        sizes: bytes of every weight. MTP weights do not count, because they may be packed smaller.
        ranks: those on this machine.

    Raises:
        ConfigError: what is needed, what there is, and the ways out.
    """
    needed = ranks * sum(rank_bytes(without_mtp(sizes), config).values())
    there = memory_bytes()
    if needed > there + min(_meminfo("SwapTotal"), swap_limit()):
        raise ConfigError(
            f"the weights take {readable(needed)} on this machine, of which this process may "
            f"use {readable(there)}: serve a smaller model or one in fewer bits (a plain one "
            f"with QWEN3NEXT_QUANTISE=int4), or put tensor-parallel ranks on other machines; "
            f"`qwen3next plan MODEL` shows what a model takes"
        )


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
