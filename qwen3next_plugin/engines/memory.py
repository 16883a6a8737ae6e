"""The refusal of weights that this process's memory cannot hold."""

import re
from collections.abc import Mapping
from pathlib import Path

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.cgroups import memory_bytes, swap_limit
from qwen3next_plugin.engines.hub import folder_here
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files
from qwen3next_plugin.model.checkpoint.sizes import part_of, rank_bytes

MEMINFO = Path("/proc/meminfo")
LEAST_POOLS = 2 << 30  # bytes for states and KV beside weights that take the rest


def mapped_bytes(model: str, revision: str | None = None, downloads: str | None = None) -> int:
    """Bytes of the files in which weights stay by QWEN3NEXT_MMAP: no engine counts their pages."""
    if not env.mmap() or (folder := folder_here(model, revision, downloads)) is None:
        return 0
    return sum(file.stat().st_size for file in weight_files(folder, read_index(folder)))


def check_weights(sizes: Mapping[str, int], config: Qwen3NextConfig, ranks: int) -> None:
    """Refuse a model whose weights alone are larger than memory and swap together.

    Args:
        sizes: bytes of every weight. The MTP layer's are left out: these may be packed smaller.
        ranks: those on this machine.

    Raises:
        ConfigError: what is needed, what there is, and the ways out.
    """
    trunk = {name: nbytes for name, nbytes in sizes.items() if part_of(name) != "MTP"}
    needed, there = ranks * sum(rank_bytes(trunk, config).values()), memory_bytes()
    if needed > there + _swap_bytes():
        raise ConfigError(
            f"the weights take {needed / 2**30:.1f} GiB on this machine, of which this process may "
            f"use {there / 2**30:.1f} GiB: serve a smaller model or one in fewer bits (a plain one "
            f"with QWEN3NEXT_QUANTISE=int4), or put tensor-parallel ranks on other machines; "
            f"`qwen3next plan MODEL` shows what a model takes"
        )


def _swap_bytes() -> float:
    found = re.search(r"^SwapTotal:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    return min(int(found[1]) << 10 if found else 0, swap_limit())
