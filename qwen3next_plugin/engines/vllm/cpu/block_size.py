"""Keeps a default block size, which a CPU's engine process would reset after workers use it."""

from vllm.config import CacheConfig

from qwen3next_plugin.engines.patching import override

CPU_BLOCK_SIZE = 128  # tokens: where vLLM starts on a CPU, before it makes room for a page


@override(
    "vllm.config.cache.CacheConfig.user_specified_block_size",
    reason="a CPU's engine process completes its configuration again after its workers have "
    "laid out the cache, and resets a default block size to 128: prompts' chunks would end "
    "inside blocks, and pages be cached for the wrong prefix",
    remove_when="vLLM no longer resets the block size (`compat`)",
)
def keep_block_size(cache_config: CacheConfig) -> None:
    """Mark a default block size as the user's, so that vLLM does not reset it."""
    if not cache_config.user_specified_block_size:
        cache_config.block_size = CPU_BLOCK_SIZE
        cache_config.user_specified_block_size = True
