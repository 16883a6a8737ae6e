"""The cores that SGLang computes with."""

import os

from qwen3next_plugin.machine.cores import share

BIND = "SGLANG_CPU_OMP_THREADS_BIND"
THREADS = "OMP_NUM_THREADS"


def bind_cores(ranks: int, nodes: int = 1) -> None:
    """Divide a node's cores among the ranks that start on it, unless the environment does.

    SGLang itself refuses more ranks than NUMA nodes, and ignores a quota. It binds threads only on
    processors with AMX; elsewhere each rank would have as many as the machine has CPUs.
    """
    found = share(max(1, ranks // nodes))  # SGLang refuses fewer ranks than nodes later
    if ranks > 1 and BIND not in os.environ:
        os.environ[BIND] = str(found)
        os.environ.setdefault(THREADS, str(found.threads or len(found.cpus[0])))
    elif found.threads is not None:
        os.environ.setdefault(THREADS, str(found.threads))
