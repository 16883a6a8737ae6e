"""vLLM's flags: every refusal and every default, before a worker starts."""

from functools import reduce
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params
from vllm.platforms import current_platform

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, check_kind, rope
from qwen3next_plugin.config.tokenizer import check_tokenizer
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.vllm.cpu.block_size import keep_block_size
from qwen3next_plugin.engines.vllm.cpu.cpu_flags import check_cpu, complete_cpu
from qwen3next_plugin.engines.vllm.cpu.graphs import keep_graphs_apart
from qwen3next_plugin.engines.vllm.cpu.memory import size_cache
from qwen3next_plugin.engines.vllm.cpu.quantisation import choose_quantisation
from qwen3next_plugin.engines.vllm.names import LOGGER, OVERRIDE_FLAG, QUANTISATION
from qwen3next_plugin.engines.vllm.prefix_pages import choose_unit
from qwen3next_plugin.engines.vllm.served import served
from qwen3next_plugin.engines.vllm.speculation.drafts_flags import (
    align_drafter,
    check_drafts,
    choose_metrics,
)
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.quantisation.at_load import check_at_load
from qwen3next_plugin.model.quantisation.in_panels import check_in_panels
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packing import check_invariance

logger = init_logger(LOGGER)


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
    for models in extras.models("vllm"):
        models.check(config, vllm_config)
    _check_policy(vllm_config)
    check_drafts(vllm_config)
    if current_platform.is_cpu():
        check_cpu(config, vllm_config)
    extras.check_flags("vllm", vllm_config)


def complete(vllm_config: VllmConfig) -> None:
    """Fill in defaults; on a CPU: cores, memory, LoRA, worker and scheduler."""
    for models in extras.models("vllm"):
        models.complete(vllm_config)
    align_drafter(vllm_config)
    if not current_platform.is_cpu():
        return
    complete_cpu(vllm_config)
    keep_block_size(vllm_config.cache_config)
    choose_unit(read_config(vllm_config), vllm_config)
    keep_graphs_apart(vllm_config)
    extras.complete_flags("vllm", vllm_config)
    choose_metrics(vllm_config)
    size_cache(read_config(vllm_config), vllm_config)


def _check_files(vllm_config: VllmConfig) -> Qwen3NextConfig:
    """Refuse a config, and a local checkpoint with a tensor missing or of another shape.

    A checkpoint of a hub, or of a format that only vLLM reads, is checked as it loads.
    """
    model_config = vllm_config.model_config
    folder = Path(model_config.model)
    if not model_config.hf_overrides:
        check_kind(folder, OVERRIDE_FLAG)
    config = read_config(vllm_config)
    if not model_config.skip_tokenizer_init:
        check_tokenizer(Path(model_config.tokenizer), config.vocab_size, "--tokenizer")
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
    """Refuse values of flags that served.py does not list."""
    drafts = vllm_config.speculative_config is not None
    tables = served(drafts=drafts, on_cpu=current_platform.is_cpu())
    for field, (values, why, fix) in tables.items():
        *owners, name = field.split(".")
        owner = reduce(getattr, owners, vllm_config)
        # A version of vLLM may lack a field.
        if owner is not None and (value := getattr(owner, name, values[0])) not in values:
            raise ConfigError(f"{name} = {value}: {why}; {fix.format(value)}")


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
    """Refuse a setting of ours together with vLLM's own quantisation and kernels."""
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
    check_in_panels(found, on_cpu=on_cpu, tp_size=tp_size, say=logger.info)
    if found is not None and vllm_config.lora_config is not None:
        raise ConfigError(
            "enable_lora: adapters of quantised projections are not served on a CPU; serve the "
            "checkpoint in bfloat16, or merge the adapter before it is quantised"
        )
    if found is not None and (note := found.described()):
        logger.info_once("qwen3next_plugin: %s", note)


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
