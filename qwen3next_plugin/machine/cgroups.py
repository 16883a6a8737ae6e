"""This process's cgroups, of version 1 or 2, which limit what it may use of the machine."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # of version 2, and of 1
USED = ("memory.current", "memory.usage_in_bytes")
SWAP = "memory.swap.max"
# In memory.stat: file-cache pages; v1 lists the cgroup's own and (total_) its subtree's.
OF_FILES = re.compile(r"^(total_)?(?:in)?active_file (\d+)$", re.MULTILINE)


def folders(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups and their ancestors, for one controller."""
    lines = OWN.read_text().splitlines() if OWN.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers or controller in controllers.split(","):
            top = CGROUPS / (controller if controllers else "")
            parts = Path(path).parts[1:]  # maybe the host's path; a container's own is at the top
            yield from (top.joinpath(*parts[:n]) for n in range(len(parts) + 1))


def memory_bytes() -> int:
    """The machine's memory, or what a cgroup grants of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_number(folder / name) for folder in folders("memory") for name in LIMITS)
    return min([machine, *(limit for limit in limits if limit is not None)])


def memory_left() -> float:
    """Bytes left under cgroup limits, droppable file cache included; infinity: no limit."""
    left = [math.inf]
    for folder in folders("memory"):
        limit, used = (
            next((n for name in names if (n := _number(folder / name)) is not None), None)
            for names in (LIMITS, USED)
        )
        if limit is not None and used is not None:
            left.append(limit - used + _of_files(folder / "memory.stat"))
    return min(left)


def _of_files(stat: Path) -> int:
    """Bytes of files in memory, which Linux drops when it needs room."""
    found = OF_FILES.findall(stat.read_text()) if stat.is_file() else []
    return max(sum(int(n) for whose, n in found if whose == kind) for kind in ("total_", ""))


def swap_limit() -> float:
    """Bytes of swap that cgroups grant; infinity: no limit."""
    limits = (_number(folder / SWAP) for folder in folders("memory"))
    return min((limit for limit in limits if limit is not None), default=math.inf)


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file, or it says `max`."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
