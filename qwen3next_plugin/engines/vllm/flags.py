"""vLLM's flags: every refusal and every default, before a worker starts."""

from functools import reduce
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import LoRAConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from qwen3next_plugin import env
from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_kind,
    check_num_draft_layers,
    check_num_speculative_tokens,
    host_rope,
    rope,
)
from qwen3next_plugin.engines.cgroups import memory_bytes
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.huge_pages import use_huge_pages
from qwen3next_plugin.engines.memory import LEAST_POOLS, check_weights, mapped_bytes
from qwen3next_plugin.engines.nodes import meet_at
from qwen3next_plugin.engines.vllm import metrics
from qwen3next_plugin.engines.vllm.cpu import page_copy
from qwen3next_plugin.engines.vllm.cpu.cores import bind_cores, chosen
from qwen3next_plugin.engines.vllm.cpu.quantisation import choose_quantisation
from qwen3next_plugin.engines.vllm.model.streams_flags import check_streams, read_texts_only
from qwen3next_plugin.engines.vllm.names import (
    EXECUTOR,
    LOGGER,
    OVERRIDE_FLAG,
    OWN_ADDRESS,
    QUANTISATION,
    RAY_EXECUTOR,
    SCHEDULER,
    STREAMS,
    WORKER,
    serves,
)
from qwen3next_plugin.engines.vllm.repairs.block_size import keep_block_size
from qwen3next_plugin.engines.vllm.repairs.graphs import keep_graphs_apart
from qwen3next_plugin.engines.vllm.served import served
from qwen3next_plugin.engines.vllm.state.folder_flags import check_folder, complete_folder
from qwen3next_plugin.engines.vllm.state.handover_flags import check_handover, complete_handover
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.sizes import served_bytes
from qwen3next_plugin.model.quantisation.at_load import check_at_load
from qwen3next_plugin.model.quantisation.in_panels import check_in_panels
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packed import check_invariance

logger = init_logger(LOGGER)

PROJECTIONS = (
    *("in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),  # of a dense MLP, and of the shared expert
)
FP8_KV = ("fp8", "fp8_e4m3", "fp8_e5m2")  # of vLLM's CPU attention


def read_config(vllm_config: VllmConfig) -> Qwen3NextConfig:
    """The model's config under these flags; raises ConfigError where it cannot be served."""
    parallel_config = vllm_config.parallel_config
    return Qwen3NextConfig.from_hf(
        vllm_config.model_config.hf_config,
        tp_size=parallel_config.tensor_parallel_size,
        pp_size=parallel_config.pipeline_parallel_size,
        override_flag=OVERRIDE_FLAG,
    )


def check(vllm_config: VllmConfig) -> None:
    """Refuse a model, its files or flags that cannot be served.

    Raises:
        ConfigError, CheckpointError: names what is wrong and the fix.
    """
    _check_flags(vllm_config)
    config = _check_files(vllm_config)
    _check_tower(vllm_config)
    _check_kernels(vllm_config)
    if env.batch_invariant():
        _check_invariance(vllm_config)
    _check_quantisation(vllm_config)
    check_streams(config, vllm_config)
    _check_policy(vllm_config)
    if vllm_config.speculative_config is not None:
        _check_method(vllm_config)
        check_num_speculative_tokens(vllm_config.num_speculative_tokens)
        _check_state(vllm_config)
        _check_processors()
    if current_platform.is_cpu():
        _check_cpu(config, vllm_config)
        _check_memory(config, vllm_config)
    check_folder(vllm_config)
    check_handover(vllm_config)


def check_drafter(model_config: ModelConfig) -> None:
    """Refuse drafts of a model without an MTP layer, before vLLM divides by their number."""
    config = Qwen3NextConfig.from_hf(model_config.hf_config, override_flag=OVERRIDE_FLAG)
    check_num_draft_layers(config, "--speculative-config")


def complete(vllm_config: VllmConfig) -> None:
    """Fill in what no flag says; on a CPU: cores, memory, LoRA, worker and scheduler."""
    if vllm_config.model_config.architecture in STREAMS:
        read_texts_only(vllm_config)
    _align_drafter(vllm_config)
    if not current_platform.is_cpu():
        return
    _bind_cores(vllm_config.parallel_config)
    _serve_apart(vllm_config)
    if vllm_config.parallel_config.nnodes > 1:
        meet_at("--master-addr", vllm_config.parallel_config.master_addr, OWN_ADDRESS)
    use_huge_pages()
    _leave_room(vllm_config)
    keep_block_size(vllm_config.cache_config)
    _limit_lora(vllm_config.lora_config)
    vllm_config.parallel_config.worker_cls = WORKER
    complete_folder(vllm_config, read_config(vllm_config))
    complete_handover(vllm_config, read_config(vllm_config))
    _call_worker_once(vllm_config.parallel_config)
    keep_graphs_apart(vllm_config)
    _choose_metrics(vllm_config)


def _leave_room(vllm_config: VllmConfig) -> None:
    """Size the KV cache beside mapped weights, which vLLM would not count as used memory."""
    cache_config, model_config = vllm_config.cache_config, vllm_config.model_config
    downloads = vllm_config.load_config.download_dir
    mapped = mapped_bytes(model_config.model, model_config.revision, downloads)
    if mapped and cache_config.kv_cache_memory_bytes is None:
        granted = int(cache_config.gpu_memory_utilization * memory_bytes())
        left = granted - mapped - LEAST_POOLS  # LEAST_POOLS stays for everything else
        cache_config.kv_cache_memory_bytes = max(LEAST_POOLS, left)


def _check_files(vllm_config: VllmConfig) -> Qwen3NextConfig:
    """Refuse a config, and a local checkpoint with a tensor missing or of another shape.

    A checkpoint of a hub, or of a format that only vLLM reads, is checked as it loads.
    """
    model_config = vllm_config.model_config
    folder = Path(model_config.model)
    if not model_config.hf_overrides:
        check_kind(folder, OVERRIDE_FLAG)
    config = read_config(vllm_config)
    if folder.is_dir() and vllm_config.load_config.load_format in READ_HERE:
        check_stored(
            folder,
            config,
            quantised=model_config.quantization is not None,
            formats=served_formats(choose_quantisation(vllm_config)),
            with_mtp=vllm_config.speculative_config is not None,
        )
    return config


def _check_flags(vllm_config: VllmConfig) -> None:
    """Refuse other values of the flags that served.py lists."""
    drafts = vllm_config.speculative_config is not None
    tables = served(drafts=drafts, on_cpu=current_platform.is_cpu())
    for field, (values, why, fix) in tables.items():
        *owners, name = field.split(".")
        owner = reduce(getattr, owners, vllm_config)
        # A version of vLLM may lack a field.
        if owner is not None and (value := getattr(owner, name, values[0])) not in values:
            raise ConfigError(f"{name} = {value}: {why}; {fix}")


def _check_tower(vllm_config: VllmConfig) -> None:
    """Refuse a vision tower that vLLM would run differently from its training."""
    model_config = vllm_config.model_config
    multimodal_config = model_config.multimodal_config
    if multimodal_config is None or multimodal_config.language_model_only:
        return
    rope.check_images(model_config.hf_text_config.rope_parameters, "--language-model-only")
    vision_config = model_config.hf_config.vision_config
    if layers := getattr(vision_config, "deepstack_visual_indexes", None):
        raise ConfigError(
            f"vision_config.deepstack_visual_indexes = {layers}: no model of this family has "
            f"them; add --language-model-only to serve text"
        )
    # vLLM normalises pixels in the tower if the file has mean and std, else not at all.
    if multimodal_config.mm_device_do_normalize and _leaves_pixels(model_config):
        raise ConfigError(
            "preprocessor_config.json has no image_mean and image_std: vLLM would give the vision "
            "tower pixels from 0 to 255; add both to the file, or --no-mm-device-do-normalize, so "
            "that the processor uses its own, or --language-model-only to serve text"
        )


def _leaves_pixels(model_config: ModelConfig) -> bool:
    """Whether vLLM would give the tower pixels as they are."""
    try:
        return _load_norm_params(model_config).is_identity
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"preprocessor_config.json: vLLM cannot read how pixels are normalised ({error}); "
            f"fetch the file again, or add --language-model-only to serve text"
        ) from error


def _check_kernels(vllm_config: VllmConfig) -> None:
    """Refuse graphs of the reference kernels."""
    if env.kernels() == "reference" and not vllm_config.model_config.enforce_eager:
        raise ConfigError(
            "QWEN3NEXT_KERNELS=reference: vLLM would compile the reference into its graphs, and "
            "reuse these in later starts with other kernels; add --enforce-eager"
        )


def _check_invariance(vllm_config: VllmConfig) -> None:
    """Refuse QWEN3NEXT_BATCH_INVARIANT unless our kernels compute every product."""
    check_invariance(vllm_config.model_config.dtype, on_cpu=current_platform.is_cpu())
    _check_own_quantisation(vllm_config, "QWEN3NEXT_BATCH_INVARIANT=1")
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "QWEN3NEXT_BATCH_INVARIANT=1: the products of adapters depend on the batch; leave out "
            "--enable-lora"
        )
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            f"QWEN3NEXT_BATCH_INVARIANT=1: our attention reads keys and values in bfloat16, not in "
            f"{cache_dtype}; leave out --kv-cache-dtype"
        )


def _check_own_quantisation(vllm_config: VllmConfig, setting: str) -> None:
    """Refuse a setting of ours beside vLLM's way to quantise, with its own kernels."""
    if (found := vllm_config.model_config.quantization) not in (None, QUANTISATION):
        raise ConfigError(f"{setting}: vLLM quantises by --quantization {found}; leave one out")


def _check_quantisation(vllm_config: VllmConfig) -> None:
    """Refuse LoRA on quantised projections, and QWEN3NEXT_QUANTISE on a GPU."""
    on_cpu = current_platform.is_cpu()
    if on_cpu and (asked := env.quantise()):
        _check_own_quantisation(vllm_config, f"QWEN3NEXT_QUANTISE={asked}")
    check_at_load(on_cpu=on_cpu)
    found = served_formats(choose_quantisation(vllm_config))
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    check_in_panels(found, on_cpu=on_cpu, tp_size=tp_size)
    if found is not None and vllm_config.lora_config is not None:
        raise ConfigError(
            "enable_lora: adapters of quantised projections are not served on a CPU; serve the "
            "checkpoint in bfloat16, or merge the adapter before it is quantised"
        )
    if found is not None and (note := found.described()):
        logger.info_once("qwen3next_plugin: %s", note)


def _check_state(vllm_config: VllmConfig) -> None:
    """Refuse drafts if vLLM's prefix cache would copy state pages with an offset.

    Runner V2 asks the model how to copy pages. Runner V1 with Triton does not, and treats a page as
    one of several states per request. Remove when no supported vLLM has runner V1.
    """
    if page_copy.needed() or vllm_config.use_v2_model_runner:
        return
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "speculative decoding with prefix caching: vLLM's model runner V1 copies this model's "
            "state pages wrongly; use runner V2 (VLLM_USE_V2_MODEL_RUNNER=1; vLLM's log says what "
            "keeps it from choosing V2), or --no-enable-prefix-caching, or no --speculative-config"
        )


def _check_method(vllm_config: VllmConfig) -> None:
    """Refuse other drafters."""
    if (method := vllm_config.speculative_config.method) != "mtp":
        raise ConfigError(
            f"--speculative-config: method {method}: the plugin drafts with the MTP layer alone; "
            f'use {{"method": "mtp", "num_speculative_tokens": 3}}, or QWEN3NEXT_DISABLE=1'
        )


def _check_policy(vllm_config: VllmConfig) -> None:
    """Refuse priorities with prefix caching.

    vLLM then preempts requests that the same step has scheduled, and leaves blocks in the cache
    that nothing has written: another prompt's state would be read. Remove when vLLM evicts them.
    """
    priorities = vllm_config.scheduler_config.policy == "priority"
    if priorities and vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "--scheduling-policy priority with prefix caching: vLLM may take blocks from the cache "
            "that were never written; add --no-enable-prefix-caching"
        )


def _check_processors() -> None:
    """Refuse logits processors that vLLM would ignore."""
    # vLLM refuses those that a flag names, and silently drops installed ones. Remove when it
    # applies them under speculation.
    if found := [entry.name for entry in entry_points(group="vllm.logits_processors")]:
        raise ConfigError(
            f"logits processors {', '.join(found)}: vLLM does not apply installed ones under "
            "speculative decoding, so drafts would change what is generated; uninstall them, or "
            "serve without --speculative-config"
        )


def _check_scheduler(scheduler: str | type[Any] | None) -> None:
    """Refuse a scheduler that would schedule drafts, or streaming input, by vLLM's rules."""
    if scheduler is None:
        return
    ours, given = (
        resolve_obj_by_qualname(found) if isinstance(found, str) else found
        for found in (SCHEDULER, scheduler)
    )
    if not issubclass(given, ours):
        raise ConfigError(
            f"scheduler_cls = {scheduler}: with drafts, make it a subclass of {SCHEDULER}"
        )


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


def _check_cpu(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Refuse runner V2, pipeline stages, engines in Ray, ranks apart, and other workers."""
    if envs.VLLM_BATCH_INVARIANT:
        raise ConfigError(
            "VLLM_BATCH_INVARIANT=1: its kernels are for GPUs; unset it, and set "
            "QWEN3NEXT_BATCH_INVARIANT=1"
        )
    _check_kv_dtype(vllm_config)
    if vllm_config.speculative_config is not None:
        _check_scheduler(vllm_config.scheduler_config.scheduler_cls)
    lora_config = vllm_config.lora_config
    if lora_config is not None and "experts" in (lora_config.target_modules or ()):
        raise ConfigError(
            "--lora-target-modules experts: on a CPU there is no LoRA for routed experts; leave "
            "them out"
        )
    if vllm_config.use_v2_model_runner:
        raise ConfigError(
            "vLLM's model runner V2 on a CPU: the plugin's worker drafts and verifies with V1; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if config.pp_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size = {config.pp_size}: vLLM's CPU runner cannot run pipeline "
            f"stages of a hybrid model (it never allocates what passes between them, and "
            f"stages without attention get another KV cache layout); use "
            f"--tensor-parallel-size {config.pp_size}"
        )
    parallel_config = vllm_config.parallel_config
    if parallel_config.data_parallel_backend == "ray":
        raise ConfigError(
            "--data-parallel-backend ray: on a CPU Ray places the workers of one engine only; "
            "leave it out, or start servers behind a router"
        )
    if _in_ray(parallel_config) and (found := chosen()):
        raise ConfigError(
            f"{found} with Ray: a worker computes with all cores that `ray start` had on its "
            f"machine; unset it, and choose them there by `taskset`"
        )
    apart = config.num_experts and not parallel_config.enable_expert_parallel
    if apart and parallel_config.data_parallel_external_lb:
        raise ConfigError(
            "--data-parallel-rank, or --data-parallel-external-lb: each engine has all experts and "
            "needs no other; start plain servers without --data-parallel-* flags, or add "
            "--enable-expert-parallel"
        )
    worker = parallel_config.worker_cls
    if worker not in ("auto", WORKER):
        raise ConfigError(
            f"worker_cls = {worker}: the plugin serves this model with its own worker, {WORKER}; "
            f"leave --worker-cls out"
        )


def _check_memory(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Refuse weights that memory cannot hold, if it is known which ranks run on this machine."""
    parallel_config, model_config = vllm_config.parallel_config, vllm_config.model_config
    local = parallel_config.data_parallel_size_local
    if not local or parallel_config.distributed_executor_backend not in ("mp", "uni", EXECUTOR):
        return
    formats = served_formats(choose_quantisation(vllm_config))
    if model_config.quantization is None or formats is not None:
        itemsize = model_config.dtype.itemsize
        sizes = served_bytes(config, itemsize, formats, asked=env.quantise())
        if parallel_config.enable_expert_parallel:
            engines = parallel_config.data_parallel_size
            sizes = {
                name: nbytes // engines if ".experts." in name else nbytes
                for name, nbytes in sizes.items()
            }
        check_weights(sizes, config, local * parallel_config.local_world_size)


def _align_drafter(vllm_config: VllmConfig) -> None:
    """Give the drafter the model's overridden RoPE and its longest context.

    For a text model positions have one axis, as in vLLM's trunk.
    """
    speculative_config, model_config = vllm_config.speculative_config, vllm_config.model_config
    if speculative_config is None or not serves(speculative_config.draft_model_config.hf_config):
        return
    text_config, draft_config = model_config.hf_text_config, speculative_config.draft_model_config
    left_out = () if model_config.uses_mrope else rope.OF_IMAGES
    parameters = text_config.rope_parameters.items()
    drafter = draft_config.hf_text_config
    host_rope.put(drafter, {name: value for name, value in parameters if name not in left_out})
    drafter.max_position_embeddings = text_config.max_position_embeddings
    if speculative_config.max_model_len is None:
        draft_config.max_model_len = model_config.max_model_len


def _bind_cores(parallel_config: ParallelConfig) -> None:
    """Bind the threads of all ranks; not if other processes, maybe on this machine, hold some.

    Where Ray has placed them, workers bind their own.
    """
    local = parallel_config.data_parallel_size == parallel_config.data_parallel_size_local
    if local and not _in_ray(parallel_config):
        bind_cores(parallel_config.data_parallel_size * parallel_config.local_world_size)


def _in_ray(parallel_config: ParallelConfig) -> bool:
    """Whether Ray places the workers; vLLM completes a configuration repeatedly."""
    return parallel_config.distributed_executor_backend in ("ray", RAY_EXECUTOR)


def _serve_apart(vllm_config: VllmConfig) -> None:
    """Make data-parallel engines independent, as those of a dense model, unless experts are shared.

    Else vLLM gives each engine a slice of every expert: they exchange tokens in each layer, and an
    idle one runs whenever another does.
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
    """Use our executor where vLLM would use its own for worker processes."""
    # vLLM turns "uni" into "mp" later, if its engine runs in its own process.
    alike = ("mp", "uni") if envs.VLLM_ENABLE_V1_MULTIPROCESSING else ("mp",)
    if parallel_config.distributed_executor_backend in alike:
        parallel_config.distributed_executor_backend = EXECUTOR
    elif parallel_config.distributed_executor_backend == "ray":
        parallel_config.distributed_executor_backend = RAY_EXECUTOR


def _choose_metrics(vllm_config: VllmConfig) -> None:
    """Register metrics of our drafter, and our scheduler for them unless a flag names another."""
    metrics.remove()
    if vllm_config.speculative_config is None:
        return
    metrics.install(vllm_config)
    if vllm_config.scheduler_config.scheduler_cls is None:
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
