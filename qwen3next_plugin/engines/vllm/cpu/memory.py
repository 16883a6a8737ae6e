"""The memory for state pages and KV on a machine that also runs other programs."""

import os
from dataclasses import replace
from typing import cast

from vllm.config import CacheConfig, VllmConfig
from vllm.logger import init_logger

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.hub import folder_here
from qwen3next_plugin.engines.memory import check_weights, mapped_bytes, share_of
from qwen3next_plugin.engines.plan import Flags, StateDtype, make_plan
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.engines.vllm.cpu.quantisation import choose_quantisation
from qwen3next_plugin.engines.vllm.names import EXECUTOR, LOGGER
from qwen3next_plugin.engines.vllm.state.pages import page_layout
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files
from qwen3next_plugin.model.checkpoint.sizes import served_bytes
from qwen3next_plugin.model.checkpoint.units import readable
from qwen3next_plugin.model.quantisation.modules import served_formats

logger = init_logger(LOGGER)

SPACE = "VLLM_CPU_KVCACHE_SPACE"
DEFAULT = CacheConfig.gpu_memory_utilization
OFFLOADED = "cpu_bytes_to_use"  # setting of a connector that keeps prefixes in /dev/shm


def check_memory(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Refuse weights larger than memory, if the number of ranks on this machine is known."""
    if ranks := _ranks(vllm_config):
        check_weights(_sizes(config, vllm_config), config, ranks)


def size_cache(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Choose the memory for states and KV, unless a setting does.

    Without a flag for the longest request, it may be as long as memory allows.

    Raises:
        ConfigError: no request fits next to the weights.
    """
    model_config = vllm_config.model_config
    if model_config.original_max_model_len is None:
        model_config.original_max_model_len = -1  # vLLM finds the length that fits
    if given(vllm_config.cache_config) or not _ranks(vllm_config):
        return
    most, auto = plan(config, vllm_config), model_config.original_max_model_len == -1
    least = replace(most, flags=replace(most.flags, max_model_len=1)) if auto else most
    if not least.fits:
        raise ConfigError(least.refusal("--kv-cache-memory-bytes"))
    chosen = most.with_default_pools().spare
    vllm_config.cache_config.kv_cache_memory_bytes = chosen
    logger.info(
        "qwen3next_plugin: states and KV take %s on each rank, of %s next to the weights "
        "(--kv-cache-memory-bytes or --gpu-memory-utilization for more)",
        *(readable(chosen), readable(most.spare)),
    )


def plan(config: Qwen3NextConfig, vllm_config: VllmConfig) -> Blocks:
    """What one rank takes, and what is free for it, before weights load."""
    ranks = max(1, _ranks(vllm_config))
    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    downloads = vllm_config.load_config.download_dir
    mapped = mapped_bytes(model_config.model, model_config.revision, downloads)
    layout = page_layout(config, vllm_config)
    flags = Flags(
        max_model_len=model_config.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        num_speculative_tokens=vllm_config.num_speculative_tokens,
        dtype=str(model_config.dtype).removeprefix("torch."),
        state_dtype=cast(StateDtype, str(layout.state_dtype).removeprefix("torch.")),
        prefix_caching=bool(cache_config.enable_prefix_caching),
        kv_itemsize=1 if cache_config.cache_dtype.startswith("fp8") else None,
        **share_of(ranks, mapped, _pinned(vllm_config)),
    )
    sizes = _sizes(config, vllm_config) or _stored_sizes(vllm_config)
    return make_plan(Blocks, config, sizes, flags)


def given(cache_config: CacheConfig) -> bool:
    """Whether a setting says how much memory to use; vLLM's own default counts as none."""
    asked = cache_config.kv_cache_memory_bytes is not None or os.environ.get(SPACE)
    return bool(asked) or cache_config.gpu_memory_utilization != DEFAULT


def _ranks(vllm_config: VllmConfig) -> int:
    """Ranks of all engines on this machine; 0 if that is not known, as with Ray."""
    parallel_config = vllm_config.parallel_config
    if parallel_config.distributed_executor_backend not in ("mp", "uni", EXECUTOR):
        return 0
    return (parallel_config.data_parallel_size_local or 0) * parallel_config.local_world_size


def _sizes(config: Qwen3NextConfig, vllm_config: VllmConfig) -> dict[str, int]:
    """Bytes of every weight; nothing if vLLM quantises them."""
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    formats = served_formats(choose_quantisation(vllm_config))
    if model_config.quantization is not None and formats is None:
        return {}
    sizes = served_bytes(config, model_config.dtype.itemsize, formats, asked=env.quantise())
    if not parallel_config.enable_expert_parallel:
        return sizes
    engines = parallel_config.data_parallel_size
    return {
        name: nbytes // engines if ".experts." in name else nbytes for name, nbytes in sizes.items()
    }


def _stored_sizes(vllm_config: VllmConfig) -> dict[str, int]:
    """Bytes of a checkpoint's tensors, from the files that are on this machine."""
    model_config = vllm_config.model_config
    downloads = vllm_config.load_config.download_dir
    folder = folder_here(model_config.model, model_config.revision, downloads)
    files = weight_files(folder, read_index(folder)) if folder else ()
    return {file.name: file.stat().st_size for file in files}


def _pinned(vllm_config: VllmConfig) -> int:
    """Bytes of /dev/shm in which this machine's engines will keep prefixes."""
    if (transfer := vllm_config.kv_transfer_config) is None:
        return 0
    engines = vllm_config.parallel_config.data_parallel_size_local
    return engines * int(transfer.kv_connector_extra_config.get(OFFLOADED, 0))
