"""How much memory state pages and KV take on a machine whose memory is for other things, too."""

from collections.abc import Callable
from typing import Any

SHARE = 4  # one part in so many of what SGLang would take
LEAST_GIB = 2.0
GIVEN = ("mem_fraction_static", "max_total_tokens", "max_mamba_cache_size")
IN_WORDS = (
    f"for states and KV 1/{SHARE} of the memory that is free, at least {LEAST_GIB:g} GiB "
    "(--mem-fraction-static for more)"
)


def modest_pools(host: Callable[..., float], configurator: Any, total_rest_memory: float) -> float:
    """Around `_handle_max_mamba_cache`: take part of the free memory, unless flags say how much.

    SGLang sizes its pools for a device that nothing else runs on: nearly all that is free. Can go
    when it asks a platform how much of the memory is to be used.

    Returns GiB for KV beside the state pages that the host sets aside.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule, get_server_args

    from qwen3next_plugin.engines.sglang.machine import is_ours

    if not is_ours(configurator.model_config) or given(get_server_args()):
        return host(configurator, total_rest_memory)
    budget = min(total_rest_memory, max(LEAST_GIB, total_rest_memory / SHARE))
    if get_memory().disable_radix_cache and get_schedule().max_running_requests is not None:
        # One page a request, however many fit: what they leave may be KV, within the same bound.
        return min(budget, host(configurator, total_rest_memory))
    return host(configurator, budget)


def given(flags: Any) -> bool:
    """Whether the command line says how much memory to take."""
    return any(getattr(flags, name) is not None for name in GIVEN)
