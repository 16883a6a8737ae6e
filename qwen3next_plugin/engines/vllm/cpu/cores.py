"""The cores that vLLM computes with."""

import os

from qwen3next_plugin.engines.cores import share

BIND = "VLLM_CPU_OMP_THREADS_BIND"
OWN = (  # of vLLM's own choice, which is kept if one of them is set
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "CPU_VISIBLE_MEMORY_NODES",
    "VLLM_CPU_SIM_MULTI_NUMA",
)
_bound = ""  # by `bind_cores`: the next engine of this process may have other ranks


def binding(ranks: int) -> dict[str, str]:
    """vLLM's variables for ranks that compute with all of their cores.

    vLLM would refuse more ranks than NUMA nodes, overlook a quota, and keep a core of each rank for
    its scheduler, which mostly waits.
    """
    found = share(ranks)
    if found.threads is None:
        return {BIND: str(found)}
    return {BIND: "nobind", "OMP_NUM_THREADS": str(found.threads)}


def bind_cores(ranks: int) -> None:
    """Bind the threads of workers that start from now on, unless the user's environment does."""
    global _bound
    if any(name in os.environ for name in OWN) or os.environ.get(BIND, _bound) != _bound:
        return
    variables = binding(ranks)
    _bound = os.environ[BIND] = variables.pop(BIND)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
