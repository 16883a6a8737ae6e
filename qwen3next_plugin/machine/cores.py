"""The cores that an engine on a CPU computes with: those of the affinity mask, within a quota."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from qwen3next_plugin.machine import cgroups

CPUS = Path("/sys/devices/system/cpu")
LIMITS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # of cgroups 2, and of 1


@dataclass(frozen=True, slots=True)
class Share:
    """What each rank computes with."""

    cpus: list[list[int]]
    threads: int | None  # under a quota: number of unbound threads; None: one bound to each CPU

    def __str__(self) -> str:
        """As both engines read it: `0,1|2,3`."""
        return "|".join(",".join(map(str, group)) for group in self.cpus)


def share(ranks: int) -> Share:
    """Divide the cores among the ranks.

    Under a quota threads are not bound: it limits time, not CPUs, and all containers of a machine
    have the same CPUs in their masks, so they would all bind to the first ones.
    """
    allowed, limit = os.sched_getaffinity(0), quota()
    cpus = _groups(ranks, _by_node(allowed))
    if limit is None or limit >= len(allowed):
        return Share(cpus, None)
    return Share(cpus, max(1, min(limit // ranks, len(cpus[0]))))


def quota() -> int | None:
    """Cores whose time cgroups grant this process, rounded down but at least 1; None: no limit."""
    granted = [cores for folder in cgroups.folders("cpu") for cores in _granted(folder)]
    return max(1, int(min(granted))) if granted else None


def _by_node(allowed: set[int]) -> list[list[int]]:
    """One CPU of each physical core, by NUMA node; the node with most comes first."""
    nodes: dict[str, dict[str, int]] = {}
    for cpu in sorted(allowed):
        folder = CPUS / f"cpu{cpu}"
        node = next((path.name for path in folder.glob("node[0-9]*")), "")
        siblings = folder / "topology" / "thread_siblings_list"
        core = siblings.read_text() if siblings.is_file() else str(cpu)
        nodes.setdefault(node, {}).setdefault(core, cpu)
    return sorted((list(cores.values()) for cores in nodes.values()), key=len, reverse=True)


def _groups(ranks: int, nodes: list[list[int]]) -> list[list[int]]:
    """One NUMA node per rank, for near memory; with too few nodes, equal parts of all cores."""
    if ranks <= len(nodes):
        return nodes[:ranks]
    cores = list(chain.from_iterable(nodes))
    size = max(1, len(cores) // ranks)
    return [
        [cores[i % len(cores)] for i in range(rank * size, (rank + 1) * size)]
        for rank in range(ranks)
    ]


def _granted(folder: Path) -> Iterator[float]:
    for names in LIMITS:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            time, period = " ".join(file.read_text() for file in files).split()
            if time not in ("max", "-1"):
                yield int(time) / int(period)
