"""The memory for state pages and KV on a machine that also runs other programs."""

import math
from collections.abc import Callable
from typing import Any

import psutil

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.cgroups import memory_left
from qwen3next_plugin.engines.memory import LEAST_POOLS, mapped_bytes
from qwen3next_plugin.engines.sglang.names import is_ours

SHARE = 4  # of SGLang's memory, 1/SHARE is used
GIB = 1 << 30
LEAST_GIB = LEAST_POOLS / GIB
GIVEN = ("mem_fraction_static", "max_total_tokens", "max_mamba_cache_size")
IN_WORDS = (
    f"for states and KV 1/{SHARE} of the memory that is free, at least {LEAST_GIB:g} GiB "
    "(--mem-fraction-static for more)"
)


def free_bytes(host: Callable[[], int]) -> int:
    """Around `get_free_cpu_memory`: what this process's cgroups leave, if there is a limit."""
    left = memory_left()
    return host() if math.isinf(left) else min(psutil.virtual_memory().available, max(0, int(left)))


def modest_pools(host: Callable[..., float], configurator: Any, total_rest_memory: float) -> float:
    """Around `_handle_max_mamba_cache`: use part of the free memory, unless flags say how much.

    Beside large weights this also uses half of what the default of --mem-fraction-static leaves
    free, because such a model would not start.

    Returns GiB for KV, in addition to the state pages that SGLang sets aside.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule, get_server_args

    if not is_ours(configurator.model_config):
        return host(configurator, total_rest_memory)
    args = get_server_args()
    budget, stated = total_rest_memory, given(args)
    if not stated:
        mapped = mapped_bytes(args.model_path, args.revision, args.download_dir)
        beside = min(total_rest_memory, memory_left() / GIB) - mapped / GIB
        room = max(total_rest_memory, free_gib(configurator) / 2)
        budget = min(room, max(LEAST_GIB, beside / SHARE))
        total_rest_memory = max(total_rest_memory, budget)
    branches = _branches(configurator, budget)
    if stated or not get_memory().disable_radix_cache or not get_schedule().max_running_requests:
        return host(configurator, budget - branches)
    # One page per request, even if more would fit; KV gets the rest of the budget.
    return min(budget, host(configurator, total_rest_memory - branches))


def free_gib(configurator: Any) -> float:
    """Free memory of the machine, the least of all ranks: as SGLang measures it here."""
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils import get_available_gpu_memory

    parallel = get_parallel()
    return get_available_gpu_memory(
        configurator.device,
        configurator.gpu_id,
        distributed=parallel.launch_world_size > 1,
        cpu_group=parallel.world_group.cpu_group,
    )


def _branches(configurator: Any, budget: float) -> float:
    """GiB of the pages for branches of draft trees, which SGLang does not count.

    Raises:
        ConfigError: they would take more than half of the budget.
    """
    from sglang.srt.runtime_context import get_schedule, get_spec

    from qwen3next_plugin.engines.sglang.state.pages import max_branches

    if not (branches := max_branches(get_spec().speculative_eagle_topk)):
        return 0.0
    requests = get_schedule().max_running_requests
    page = configurator.mambaish_config.mamba2_cache_params.mamba_cache_per_req / GIB
    if (taken := requests * branches * page) > budget / 2:
        raise ConfigError(
            f"--max-running-requests {requests}: the draft trees of so many requests branch on "
            f"{taken:.2f} GiB of state pages, of {budget:.2f} GiB for states and KV; use fewer "
            f"({int(budget / 2 / branches / page)} fit), a smaller --speculative-num-draft-tokens, "
            f"--speculative-eagle-topk 1, or a larger --mem-fraction-static"
        )
    return taken


def given(flags: Any) -> bool:
    """Whether the command line says how much memory to use."""
    return any(getattr(flags, name) is not None for name in GIVEN)
