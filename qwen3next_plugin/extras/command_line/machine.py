"""The machine's cores, memory, and the processor flags that the kernels use."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from qwen3next_plugin.machine.cgroups import memory_bytes
from qwen3next_plugin.machine.cores import quota

# The names in /proc/cpuinfo of what kernels/native/ops.cpp checks.
X86_FLAGS = (
    "avx2", "fma", "f16c",
    "avx512f", "avx512bw", "avx512vl", "avx512dq",
    "avx512_bf16", "avx512_vnni",
    "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
ARM_FLAGS = ("asimddp", "i8mm", "bf16")
FLAGS = ARM_FLAGS if platform.machine() == "aarch64" else X86_FLAGS


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use of the machine."""

    architecture: str
    cores: int
    memory_bytes: int
    flags: tuple[str, ...]


def machine() -> Machine:
    """Read the machine; a container's limits of cores and memory count if they are lower."""
    return Machine(platform.machine(), _cores(), memory_bytes(), _flags())


def _cores() -> int:
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(cores, quota() or cores)


def _flags() -> tuple[str, ...]:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return tuple(flag for flag in FLAGS if flag in words)
