"""The places for a request's tokens, one row of SGLang's table for each request."""

from collections.abc import Callable

from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.WITH_OURS,
    "sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len",
    reason="with draft trees, or 8 drafts, a step reserves more tokens than a request has "
    "places, which ends the scheduler near the context's end",
    remove_when="SGLang counts the reserve for pages of one token, too",
)
def with_reserve(host: Callable[[], int]) -> int:
    """Places of a row behind the context length: also for all that a step with drafts reserves."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(host(), get_alloc_reserve_per_decode())
