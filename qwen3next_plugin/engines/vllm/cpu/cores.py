"""The cores that vLLM computes with."""

import os

from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


def use_both_cores() -> None:
    """Compute with both cores of a two-core machine, unless the user's environment says otherwise.

    vLLM reserves one core, half of the machine, for its scheduler, which mostly waits.
    """
    cores = {(cpu.numa_node, cpu.physical_core) for cpu in get_allowed_cpu_list()}
    if len(cores) == 2:
        os.environ.setdefault(RESERVED, "0")
