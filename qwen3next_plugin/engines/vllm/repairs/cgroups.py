"""What a container or a systemd unit may use, where vLLM asks for it.

vLLM reads the topmost cgroup alone, and counts what Linux keeps of files as used: when a checkpoint
has been read, a container seems to be full.
"""

import math
from collections.abc import Callable

from qwen3next_plugin.engines.cgroups import memory_bytes, memory_left


def limit(host: Callable[[], int | None]) -> int | None:
    """Around `get_cgroup_memory_limit`: the least of all cgroups of this process."""
    return None if math.isinf(memory_left()) else memory_bytes()


def usage(host: Callable[[], int | None]) -> int | None:
    """Around `get_cgroup_memory_usage`: without what Linux can drop of files."""
    left = memory_left()
    return None if math.isinf(left) else max(0, memory_bytes() - int(left))
