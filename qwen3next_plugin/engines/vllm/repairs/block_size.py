"""An open block size, which a CPU's engine process would reset once its workers have used it."""

from vllm.config import CacheConfig

CPU_BLOCK_SIZE = 128  # tokens: where vLLM starts on a CPU, before it makes room for a page


def keep_block_size(cache_config: CacheConfig) -> None:
    """Mark a default block size as the user's, so that vLLM does not reset it (see patches.py)."""
    if not cache_config.user_specified_block_size:
        cache_config.block_size = CPU_BLOCK_SIZE
        cache_config.user_specified_block_size = True
