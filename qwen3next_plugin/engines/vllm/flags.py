"""What is refused before a worker starts; vLLM calls this while it completes its configuration."""

from pathlib import Path

from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from qwen3next_plugin import __version__, env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.vllm import metrics
from qwen3next_plugin.engines.vllm.flags_speculation import check_speculation
from qwen3next_plugin.engines.vllm.names import SCHEDULER, WORKER, logger
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.model.weights import check_files
from qwen3next_plugin.versions import check_host

CPU_BLOCK_SIZE = 128  # tokens: what vLLM starts from on a CPU, before it makes room for a page
PROJECTIONS = ("in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")


def read_config(vllm_config: VllmConfig) -> Qwen3NextConfig:
    """Our view of the model's config under these flags; complains where it cannot be served."""
    parallel_config = vllm_config.parallel_config
    return Qwen3NextConfig.from_hf(
        vllm_config.model_config.hf_text_config,
        tp_size=parallel_config.tensor_parallel_size,
        pp_size=parallel_config.pipeline_parallel_size,
        override_flag="--hf-overrides",
    )


class Qwen3NextChecks(VerifyAndUpdateConfig):
    """Stands in vLLM's MODELS_CONFIG_MAP under the model's architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse a model, its files or its flags by name.

        Raises:
            ConfigError, CheckpointError: naming the thing and the mend.
        """
        logger.info_once(
            "qwen3next_plugin %s serves this model on vLLM %s, with %s kernels",
            __version__,
            check_host("vllm"),
            described("cpu" if current_platform.is_cpu() else "cuda"),
        )
        config = read_config(vllm_config)
        check_files(Path(vllm_config.model_config.model))
        _check_kernels(vllm_config)
        if vllm_config.speculative_config is not None:
            check_speculation(vllm_config)
        if current_platform.is_cpu():
            _check_cpu(config, vllm_config)


class NoKernels(VerifyAndUpdateConfig):
    """Stands there on a platform that our kernels do not run on, where vLLM's own model stays."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Say so."""
        logger.info_once(
            "qwen3next_plugin %s has no kernels for %s: vLLM %s keeps its own Qwen3-Next",
            __version__,
            current_platform.device_name,
            check_host("vllm"),
        )


def _check_kernels(vllm_config: VllmConfig) -> None:
    """Refuse graphs that hold the reference; vLLM keeps graphs, and asks no variable of ours."""
    if env.kernels() == "reference" and not vllm_config.model_config.enforce_eager:
        raise ConfigError(
            "QWEN3NEXT_KERNELS=reference: vLLM would compile the reference into its graphs, and "
            "keep these for later starts with other kernels; add --enforce-eager"
        )


def _check_cpu(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Refuse what vLLM's CPU runner cannot do, keep LoRA off what it cannot adapt; our worker."""
    if config.pp_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size = {config.pp_size}: vLLM's CPU runner cannot run pipeline "
            f"stages of a hybrid model (it never allocates what passes between them, and "
            f"stages without attention get another KV cache layout); use "
            f"--tensor-parallel-size {config.pp_size}"
        )
    lora_config = vllm_config.lora_config
    if lora_config is not None and lora_config.target_modules is None:
        # vLLM would adapt the experts too, by Triton kernels that a CPU does not have.
        lora_config.target_modules = list(PROJECTIONS)
        logger.info("LoRA adapts %s; vLLM has no LoRA experts on a CPU", ", ".join(PROJECTIONS))
    _keep_block_size(vllm_config.cache_config)
    _choose_worker(vllm_config)
    _choose_metrics(vllm_config)


def _keep_block_size(cache_config: CacheConfig) -> None:
    """Have the block size stand that the cache is laid out with.

    vLLM's engine process completes its configuration once more when its workers are ready, and on
    a CPU that sets a block size which the user left open back to 128. Its scheduler then lets
    chunks of a prompt end where no block ends, and a page is cached for a prefix that is not its
    own. A size that the user asked for stays. Can go with the host's second completion: a test
    marked `compat`.
    """
    if not cache_config.user_specified_block_size:
        cache_config.block_size = CPU_BLOCK_SIZE
        cache_config.user_specified_block_size = True


def _choose_metrics(vllm_config: VllmConfig) -> None:
    """Serve metrics where our drafter drafts; use our scheduler unless another was asked for."""
    metrics.remove()
    parallel_config = vllm_config.parallel_config
    if vllm_config.speculative_config is None or parallel_config.data_parallel_size > 1:
        return
    metrics.install(vllm_config)
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER


def _choose_worker(vllm_config: VllmConfig) -> None:
    """Our worker, unless another was asked for."""
    parallel_config = vllm_config.parallel_config
    if parallel_config.worker_cls not in ("auto", WORKER):
        raise ConfigError(
            f"worker_cls = {parallel_config.worker_cls}: the plugin serves this model with its own "
            f"worker, {WORKER}; leave --worker-cls out"
        )
    parallel_config.worker_cls = WORKER
