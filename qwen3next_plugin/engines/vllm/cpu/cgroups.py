"""Tells vLLM what a container or a systemd unit may use.

vLLM reads the topmost cgroup only, and counts the file cache as used: after reading a checkpoint a
container seems to be full.
"""

import math
from collections.abc import Callable

from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.machine.cgroups import memory_bytes, memory_left


@patch(
    When.IN_WORKER,
    "vllm.utils.cpu_resource_utils.get_cgroup_memory_limit",
    reason="vLLM knows the topmost cgroup's limit alone, and counts files in memory as used",
    remove_when="vLLM reads /proc/self/cgroup",
    upstream="https://github.com/vllm-project/vllm/pull/45086",
)
def limit(host: Callable[[], int | None]) -> int | None:
    """Around `get_cgroup_memory_limit`: the least of all cgroups of this process."""
    return None if math.isinf(memory_left()) else memory_bytes()


@patch(
    When.IN_WORKER,
    "vllm.utils.cpu_resource_utils.get_cgroup_memory_usage",
    reason="vLLM knows the topmost cgroup's limit alone, and counts files in memory as used",
    remove_when="vLLM leaves out what memory.stat has of files",
    upstream="https://github.com/vllm-project/vllm/pull/45086",
)
def usage(host: Callable[[], int | None]) -> int | None:
    """Around `get_cgroup_memory_usage`: without file cache that Linux can drop."""
    left = memory_left()
    return None if math.isinf(left) else max(0, memory_bytes() - int(left))
