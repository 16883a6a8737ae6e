"""The places for a request's tokens, one row of SGLang's table for each request."""

from collections.abc import Callable


def with_reserve(host: Callable[[], int]) -> int:
    """Places of a row behind the context length: also for all that a step with drafts reserves."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(host(), get_alloc_reserve_per_decode())
