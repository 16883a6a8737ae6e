"""This process's cgroups, of version 1 or 2, which limit what it may use of the machine."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2, and of 1


def folders(controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups that a controller may limit, with those above."""
    lines = OWN.read_text().splitlines() if OWN.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or controller in controllers.split(","):
            top = CGROUPS / (controller if controllers else "")
            parts = Path(path).parts[1:]  # in a container maybe the host's; its own is at the top
            yield from (top.joinpath(*parts[:n]) for n in range(len(parts) + 1))


def memory_bytes() -> int:
    """The machine's memory, or what a cgroup grants of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in (folder / name for folder in folders("memory") for name in LIMITS):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
