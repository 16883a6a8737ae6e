"""The cores that vLLM computes with."""

import os

from qwen3next_plugin.machine.cores import share

BIND = "VLLM_CPU_OMP_THREADS_BIND"
OWN = (  # vLLM's variables for cores; if one is set, vLLM's choice is kept
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "CPU_VISIBLE_MEMORY_NODES",
    "VLLM_CPU_SIM_MULTI_NUMA",
)
_bound = ""  # value set by `bind_cores`: this process's next engine may have other ranks


def binding(ranks: int) -> dict[str, str]:
    """vLLM's variables that let ranks compute with all of their cores.

    vLLM would refuse more ranks than NUMA nodes, ignore a quota, and keep a core of each rank for
    its scheduler, which mostly waits.
    """
    found = share(ranks)
    if found.threads is None:
        return {BIND: str(found)}
    return {BIND: "nobind", "OMP_NUM_THREADS": str(found.threads)}


def chosen() -> str | None:
    """The variable with which the user's environment chooses cores, or None."""
    names = [name for name in OWN if name in os.environ]
    if os.environ.get(BIND, _bound) != _bound:
        names.append(BIND)
    return names[0] if names else None


def bind_cores(ranks: int) -> None:
    """Bind the threads of workers that start from now on, unless the user's environment does."""
    global _bound
    if chosen() is not None:
        return
    variables = binding(ranks)
    _bound = os.environ[BIND] = variables.pop(BIND)
    for name, value in variables.items():
        os.environ.setdefault(name, value)
