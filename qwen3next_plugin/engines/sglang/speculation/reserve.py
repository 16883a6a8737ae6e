"""Row length of SGLang's table, which has a place for each token of a request."""

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
    """Extra places of a row beyond the context length, enough for what drafts reserve."""
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

    return max(host(), get_alloc_reserve_per_decode())
