"""vLLM's executor of Ray actors: what is refused."""

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.extras import executors
from qwen3next_plugin.engines.vllm.cpu.cores import chosen
from qwen3next_plugin.engines.vllm.cpu.cpu_flags import RAY


def check_ray(vllm_config: VllmConfig) -> None:
    """Refuse a choice of cores for workers that Ray places.

    Raises:
        ConfigError: names the setting and the fix.
    """
    backend = vllm_config.parallel_config.distributed_executor_backend
    in_ray = current_platform.is_cpu() and backend in (RAY, executors("vllm")[RAY])
    if in_ray and (found := chosen()):
        raise ConfigError(
            f"{found} with Ray: a worker computes with all cores that `ray start` had on its "
            f"machine; unset it, and choose them there by `taskset`"
        )
