"""vLLM's flags on a CPU: refusals and defaults."""

import os

from vllm import envs
from vllm.config import LoRAConfig, ParallelConfig, VllmConfig
from vllm.logger import init_logger

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.pacing import TIMEOUT
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.cpu.cores import bind_cores
from qwen3next_plugin.engines.vllm.cpu.memory import check_memory
from qwen3next_plugin.engines.vllm.names import (
    EXECUTOR,
    LOGGER,
    WORKER,
)
from qwen3next_plugin.machine.compiler import skip_trials
from qwen3next_plugin.machine.huge_pages import use_huge_pages

logger = init_logger(LOGGER)

PROJECTIONS = (
    *("in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),  # of a dense MLP, and of the shared expert
)
RAY = "ray"  # vLLM's executor of Ray actors
FP8_KV = ("fp8", "fp8_e4m3", "fp8_e5m2")  # of vLLM's CPU attention


@override(
    "vllm.config.model_arch.ModelArchitectureConfig.num_experts",
    reason="vLLM takes a slice of each expert for each data-parallel engine, even without "
    "expert parallelism: they would exchange tokens in each layer, and all run when one does",
    remove_when="vLLM can keep engines of a mixture of experts apart",
)
def check_cpu(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Refuse what several flags make impossible on a CPU, and weights that do not fit.

    Raises:
        ConfigError: names the flag and the fix.
    """
    if envs.VLLM_BATCH_INVARIANT:
        raise ConfigError(
            "VLLM_BATCH_INVARIANT=1: its kernels are for GPUs; unset it, and set "
            "QWEN3NEXT_BATCH_INVARIANT=1"
        )
    _check_kv_dtype(vllm_config)
    lora_config = vllm_config.lora_config
    if lora_config is not None and "experts" in (lora_config.target_modules or ()):
        raise ConfigError(
            "--lora-target-modules experts: on a CPU there is no LoRA for routed experts; leave "
            "them out"
        )
    parallel_config = vllm_config.parallel_config
    backend = parallel_config.distributed_executor_backend
    if backend == RAY and backend not in extras.executors("vllm"):
        raise ConfigError(f"--distributed-executor-backend {RAY}: {extras.MISSING}; leave it out")
    apart = config.num_experts and not parallel_config.enable_expert_parallel
    if apart and parallel_config.data_parallel_external_lb:
        raise ConfigError(
            "--data-parallel-rank, or --data-parallel-external-lb: each engine has all experts and "
            "needs no other; start plain servers without --data-parallel-* flags, or add "
            "--enable-expert-parallel"
        )
    check_memory(config, vllm_config)


def _check_kv_dtype(vllm_config: VllmConfig) -> None:
    """Refuse KV in a dtype that vLLM's CPU attention would read as another."""
    given, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
    own = str(dtype).removeprefix("torch.")
    if given not in ("auto", own, *FP8_KV):
        raise ConfigError(
            f"kv_cache_dtype = {given}: on a CPU it is that of the activations ({own}) or one of "
            f"{', '.join(FP8_KV)}; leave out --kv-cache-dtype"
        )
    if (drafts := vllm_config.speculative_config) is None:
        return
    if drafts.kv_cache_dtype not in (None, given):
        raise ConfigError(
            f"kv_cache_dtype = {drafts.kv_cache_dtype} of --speculative-config: model and drafter "
            f"share a cache; leave it out"
        )


def complete_cpu(vllm_config: VllmConfig) -> None:
    """Fill in cores, LoRA, worker, executor and how long a step may take."""
    # vLLM ends a server whose step takes over 300 s; a long prompt on few cores may.
    os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(TIMEOUT))
    parallel_config = vllm_config.parallel_config
    _bind_cores(parallel_config)
    _serve_apart(vllm_config)
    use_huge_pages()
    skip_trials()
    _limit_lora(vllm_config.lora_config)
    parallel_config.worker_cls = WORKER
    _call_worker_once(parallel_config)


def _bind_cores(parallel_config: ParallelConfig) -> None:
    """Bind the threads of all ranks, unless some ranks may be in processes started elsewhere.

    Workers that an extra's executor starts bind their own threads.
    """
    local = parallel_config.data_parallel_size == parallel_config.data_parallel_size_local
    found = extras.executors("vllm")  # vLLM completes a configuration repeatedly
    elsewhere = parallel_config.distributed_executor_backend in (*found, *found.values())
    if local and not elsewhere:
        bind_cores(parallel_config.data_parallel_size * parallel_config.local_world_size)


def _serve_apart(vllm_config: VllmConfig) -> None:
    """Make data-parallel engines independent, as those of a dense model, unless experts are shared.

    Otherwise vLLM would give each engine a slice of every expert: engines would exchange tokens in
    each layer, and an idle one would run whenever another does.
    """
    parallel_config = vllm_config.parallel_config
    if parallel_config.data_parallel_size > 1 and not parallel_config.enable_expert_parallel:
        vllm_config.model_config.model_arch_config.num_experts = 0


def _limit_lora(lora_config: LoRAConfig | None) -> None:
    """Exclude the experts from LoRA: on a CPU vLLM has no LoRA kernels for them."""
    if lora_config is not None and lora_config.target_modules is None:
        lora_config.target_modules = list(PROJECTIONS)
        logger.info("LoRA adapts %s; vLLM has no LoRA experts on a CPU", ", ".join(PROJECTIONS))


def _call_worker_once(parallel_config: ParallelConfig) -> None:
    """Use our executor in place of vLLM's for worker processes."""
    # vLLM turns "uni" into "mp" later, if its engine runs in its own process.
    alike = ("mp", "uni") if envs.VLLM_ENABLE_V1_MULTIPROCESSING else ("mp",)
    if parallel_config.distributed_executor_backend in alike:
        parallel_config.distributed_executor_backend = EXECUTOR
    elif (backend := parallel_config.distributed_executor_backend) in extras.executors("vllm"):
        parallel_config.distributed_executor_backend = extras.executors("vllm")[backend]
