"""Every function of SGLang's that the plugin holds on to, and why.

All are for SGLang 0.5.23. WITH_OURS are where ours serves, on a CPU with ON_CPU, on a GPU with
ON_GPU; ELSEWHERE is where SGLang keeps its own Qwen3-Next.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.configs.qwen3_next import Qwen3NextConfig as HostConfig

from qwen3next_plugin import __version__
from qwen3next_plugin.engines.patching import Attribute, Hook
from qwen3next_plugin.engines.sglang import flags as arguments
from qwen3next_plugin.engines.sglang.cpu import memory
from qwen3next_plugin.engines.sglang.cpu.attention_backend import create_draft_backend
from qwen3next_plugin.engines.sglang.cpu.environment import on_gpu
from qwen3next_plugin.engines.sglang.names import MODEL_TYPE, is_ours, logger
from qwen3next_plugin.engines.sglang.speculation import penalties, sampling
from qwen3next_plugin.engines.sglang.speculation import verify as verification
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.versions import check_host

LAYER_NAMES = {"full_attention": "attention", "linear_attention": "linear_attention"}


def keep_config(host: Callable[..., None], config: Any, *args: Any, **given: Any) -> None:
    """Keep what SGLang drops of a newer config.json: `layer_types` and `rope_parameters`.

    It wants `full_attention_interval`, which transformers 5 no longer writes, and takes a rope
    theta of 10,000 where it finds none at the top level. transformers checks YaRN's parameters
    against `max_position_embeddings`, which SGLang sets too late. Can go when SGLang reads all.
    """
    if config.model_type != MODEL_TYPE:  # SGLang's Qwen3.5 is built on this class
        host(config, *args, **given)
        return
    host(config, *args, **{name: given[name] for name in given if name != "rope_parameters"})
    config.layer_types = given.get("layer_types") or _at_interval(config)
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    config.rope_parameters = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name not in given:  # SGLang's default, which a model is not trained with
            setattr(config, name, rope.get(name))


def _at_interval(config: Any) -> list[str]:
    interval = getattr(config, "full_attention_interval", 4)
    return [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(config.num_hidden_layers)
    ]


host_layers_block_type = HostConfig.layers_block_type.fget
host_mamba2_cache_params = HostConfig.mamba2_cache_params.fget


def layers_block_type(config: Any) -> list[str]:
    """The kind of each layer, in SGLang's words."""
    if config.model_type != MODEL_TYPE:
        return host_layers_block_type(config)
    return [LAYER_NAMES[layer_type] for layer_type in config.layer_types]


def mamba2_cache_params(config: Any) -> Any:
    """What SGLang sizes its pools by: pages, of a model that ours serves."""
    if config.model_type != MODEL_TYPE:
        return host_mamba2_cache_params(config)
    from qwen3next_plugin.engines.sglang.state.pages import page_params

    return page_params(config)


def make_page_pool(host: Callable[..., None], pool: Any, *args: Any, **kwargs: Any) -> None:
    """Our class for a pool of pages. Can go when a config can name its pool's class."""
    from qwen3next_plugin.engines.sglang.state.pages import PageParams, PagePool

    if isinstance(kwargs["cache_params"], PageParams):
        pool.mamba_pool_cls = PagePool
    host(pool, *args, **kwargs)


def skip_snapshots(host: Callable[[], bool]) -> bool:
    """Reserve no k + 1 states a request: a page takes drafts back by itself.

    Can go when a config can say so.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.runtime_context import get_server_args

    return is_ours(model_config_of(get_server_args())) or host()


def keep_sizes(host: Callable[..., Any], model_config: Any, *args: Any) -> Any:
    """Leave head counts and widths as they are: SGLang pads them to what its AMX kernels take.

    Our kernels take any, and our checks compare a checkpoint with its own config. Can go when
    SGLang pads only for its AMX kernels.
    """
    return model_config if is_ours(model_config) else host(model_config, *args)


def wrap_backend(host: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    """Our linear-attention backend beside the attention backend that was chosen.

    Can go when a registered linear-attention model may take the place of a built-in one.
    """
    if not is_ours(runner.model_config):
        return host(runner, full_attn_backend)
    if runner.is_draft_worker:  # one layer of full attention
        return full_attn_backend
    layers = runner.model_config.hf_config.full_attention_layer_ids
    if on_gpu():
        from qwen3next_plugin.engines.sglang.state.device_steps import (
            DeviceBackend,
            DeviceHybridBackend,
        )

        return DeviceHybridBackend(full_attn_backend, DeviceBackend(runner), layers)
    from qwen3next_plugin.engines.sglang.state.steps import HybridBackend, LinearBackend

    return HybridBackend(full_attn_backend, LinearBackend(runner), layers)


def verify_by_sampling(host: Callable[..., bool], **given: Any) -> bool:
    """Whether a verification is greedy: where its requests are, not because it is on a CPU.

    SGLang 0.5.23 has no CPU kernels to sample with and verifies greedily whatever the temperature.
    Can go, with the two functions beside it, when it has.
    """
    return host(**given | {"is_cpu": False})


def choose_worker(host: Callable[..., Any], algorithm: Any, server_args: Any) -> Any:
    """Our worker where a chain is drafted from the checkpoint's own head.

    Can go when SGLang asks an in-tree platform for its worker, as it asks others.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    given = resolving_view(server_args)
    chain = algorithm.is_eagle() and given.speculative_eagle_topk == 1
    if not (chain and is_ours(model_config_of(server_args))):
        return host(algorithm, server_args)
    from qwen3next_plugin.engines.sglang.speculation.worker import Worker

    return Worker


def check_on_gpu(host: Callable[..., None], server_args: Any) -> None:
    """Refuse what cannot be served, and say that ours serves.

    SGLang calls this once, in the process that starts the others; its platforms for GPUs are its
    own, so that nothing of ours is asked as it is on a CPU. Can go when a plugin may check flags.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    from qwen3next_plugin.engines.sglang.flags_common import check, check_architecture

    host(server_args)
    if is_ours(model_config := model_config_of(server_args)):
        flags = resolving_view(server_args)
        check(flags, model_config, on_cpu=False)
        check_architecture()
        if flags.mamba_radix_cache_strategy == "no_buffer":  # with which no step runs ahead
            declare_resolution(server_args, "qwen3next_plugin", disable_overlap_schedule=True)
        logger.info(
            "qwen3next_plugin %s serves this model on SGLang %s, with %s kernels",
            *(__version__, check_host("sglang"), described("cuda")),
        )


def say_no_kernels(host: Callable[..., None], server_args: Any) -> None:
    """Say that our model does not serve. Can go with our kernels for such a device."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    if is_ours(model_config_of(server_args)):
        logger.info(
            "qwen3next_plugin %s has no kernels for %s yet: SGLang %s keeps its own Qwen3-Next",
            *(__version__, resolving_view(server_args).device, check_host("sglang")),
        )
    host(server_args)


ANYWHERE: tuple[Hook | Attribute, ...] = (
    Hook(
        target="sglang.srt.arg_groups.speculative_hook._handle_eagle_family",
        parameters=("server_args",),
        around=arguments.complete_drafts,
    ),
)

ELSEWHERE: tuple[Hook | Attribute, ...] = (
    Hook(
        target="sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
        parameters=("server_args",),
        around=say_no_kernels,
    ),
)

ON_GPU: tuple[Hook | Attribute, ...] = (
    Hook(
        target="sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
        parameters=("server_args",),
        around=check_on_gpu,
    ),
)

WITH_OURS: tuple[Hook | Attribute, ...] = (
    Hook(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.__init__",
        parameters=(
            "self",
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "hidden_act", "output_gate_type"),
            *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
            *("tie_word_embeddings", "rope_theta", "rope_scaling", "partial_rotary_factor"),
            *("attention_bias", "attention_dropout", "head_dim", "linear_conv_kernel_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
            *("linear_num_value_heads", "decoder_sparse_step", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "num_experts_per_tok", "num_experts"),
            *("norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
            *("mlp_only_layers", "layer_types", "kwargs"),
        ),
        around=keep_config,
    ),
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.layers_block_type",
        value=property(layers_block_type),
    ),
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.mamba2_cache_params",
        value=property(mamba2_cache_params),
    ),
    Hook(
        target="sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool._init_mamba_pool",
        parameters=(
            *("self", "mamba_size", "mamba_spec_state_size", "cache_params", "mamba_layer_ids"),
            *("device", "enable_mamba_extra_buffer", "speculative_num_draft_tokens"),
            *("speculative_eagle_topk", "enable_linear_replayssm", "linear_replayssm_cache_len"),
            *("mamba_envelope_layout", "enable_linear_replayssm_spec", "short_conv_layer_ids"),
            *("short_conv_state_shape", "ngram_context_len", "ngram_eos_token_id"),
        ),
        around=make_page_pool,
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator._pd_prefill_skips_mamba_spec_state",
        parameters=(),
        around=skip_snapshots,
    ),
    Hook(
        target="sglang.srt.layers.attention.attention_registry.attn_backend_wrapper",
        parameters=("runner", "full_attn_backend"),
        around=wrap_backend,
    ),
)

ON_CPU: tuple[Hook | Attribute, ...] = (
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache",
        parameters=("self", "total_rest_memory"),
        around=memory.modest_pools,
    ),
    Hook(
        target="sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        parameters=("model_config", "load_config", "tp_size"),
        around=keep_sizes,
    ),
    Hook(
        target="sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend",
        parameters=(*("self", "backend_name", "backend_map", "error_template", "stamps_children"),),
        around=create_draft_backend,
    ),
    Hook(
        target="sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker",
        parameters=("self", "server_args"),
        around=choose_worker,
    ),
    Hook(
        target="sglang.srt.speculative.eagle_utils._verify_uses_greedy",
        parameters=("is_all_greedy", "is_cpu", "is_hip", "is_xpu", "use_rejection_sampling"),
        around=verify_by_sampling,
    ),
    Hook(
        target="sglang.srt.speculative.eagle_utils.eagle_sample",
        parameters=(
            *("verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k"),
            *("watermark_state", "watermark_full_mask"),
        ),
        around=verification.sample_as_plain,
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        parameters=("self",),
        around=penalties.count_every_token,
    ),
    *(
        Attribute(target=f"sglang.srt.speculative.eagle_utils.{function.__name__}", value=function)
        for function in (
            sampling.top_k_renorm_prob,
            sampling.tree_speculative_sampling_target_only,
        )
    ),
)
