"""SGLang's config of the family: fields that its class drops, RoPE, the longest context."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from sglang.srt.configs.qwen3_next import Qwen3NextConfig as HostConfig
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.config import (
    check_before_engine,
    check_extra,
    host_rope,
    model_types,
    naming_file,
    rope,
)
from qwen3next_plugin.engines.patching import Attribute
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.names import (
    DENSE,
    MODEL_TYPES,
    OF_EXTRAS,
    OVERRIDE_FLAG,
    QWEN3_NEXT,
    TEXTS_ONLY,
    WRAPPERS,
    is_ours,
    serves,
    serves_ours,
)
from qwen3next_plugin.engines.sglang.patches import TABLE, When, patch

LAYER_NAMES = {"full_attention": "attention", "linear_attention": "linear_attention"}
SIZES_OF_EXPERTS = (
    *("num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)

host_layers_block_type = HostConfig.layers_block_type.fget
host_mamba2_cache_params = HostConfig.mamba2_cache_params.fget


@patch(
    When.WITH_OURS,
    "sglang.srt.arg_groups.muse_spark_hook.apply_muse_spark_env_defaults",
    reason="the first that reads config.json; a damaged one ends SGLang in errors that name no "
    "file, or makes it list the layers of any number of them",
    remove_when="SGLang checks the file's types, and names it",
)
def check_file(host: Callable[[Any], None], server_args: Any) -> None:
    """Around the first function that reads a config.json: check it, and name it in errors."""
    from sglang.srt.arg_groups.overrides import resolving_view

    model = resolving_view(server_args).model_path
    check_before_engine(model)
    with naming_file(model, "SGLang", OVERRIDE_FLAG):
        host(server_args)


@patch(
    When.WITH_OURS,
    "sglang.srt.configs.qwen3_next.Qwen3NextConfig.__init__",
    reason="SGLang drops layer_types and rope_parameters of a newer config.json, and has 512 "
    "experts in a dense Qwen3.5",
    remove_when="SGLang reads all three",
)
def keep_config(host: Callable[..., None], config: Any, *args: Any, **given: Any) -> None:
    """Keep `layer_types` and `rope_parameters`, which SGLang drops; a dense model has no experts.

    SGLang wants `full_attention_interval`, which transformers 5 no longer writes, and assumes a
    rope theta of 10,000 where the top level has none. `rope_parameters` is set afterwards because
    transformers checks YaRN's against `max_position_embeddings`, which SGLang sets too late.
    """
    if config.model_type not in MODEL_TYPES:  # other models are built on this class
        host(config, *args, **given)
        return
    host(config, *args, **{name: given[name] for name in given if name != "rope_parameters"})
    config.layer_types = given.get("layer_types") or at_interval(config)
    parameters = given.get("rope_parameters") or given.get("rope_scaling") or {}
    config.rope_parameters = dict(parameters)
    for name in rope.OF_ROPE:
        if name in parameters and name not in given:
            setattr(config, name, parameters[name])
        elif name not in given and config.model_type == QWEN3_NEXT:
            setattr(config, name, None)  # SGLang's default is not what a model is trained with
    if config.model_type == DENSE:
        for name in SIZES_OF_EXPERTS:  # SGLang's defaults are an MoE model's
            setattr(config, name, 0)


@patch(
    When.WITH_OURS,
    "sglang.srt.configs.model_config.get_config",
    reason="an override of a nested text model's RoPE replaces all of it, and one of "
    "rope_scaling has no effect there; and an extra may serve texts only",
    remove_when="SGLang merges it, at either level, and lets a plugin change a config",
    upstream="https://github.com/sgl-project/sglang/pull/27983",
)
def merge_overrides(
    host: Callable[..., Any],
    model: str,
    *args: Any,
    model_override_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Around `get_config`: an override of RoPE changes only fields it names, at either level."""
    everything = model_override_args or {}
    rest, given = host_rope.split(everything)
    config = host(model, *args, model_override_args=rest, **kwargs)
    if without_gpu():
        check_extra(getattr(config, "model_type", None))
    for models in OF_EXTRAS:
        config = models.text_config(config)
    if not given:
        return config
    if not serves(config):
        return host(model, *args, model_override_args=everything, **kwargs)
    config = deepcopy(config)  # SGLang caches it
    host_rope.override(config.get_text_config(), given, everything)
    return config


@patch(
    When.WITH_OURS,
    "sglang.srt.configs.model_config.ModelConfig._derive_context_length",
    reason="SGLang ignores YaRN's factor in the longest context, and asks for "
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN",
    remove_when="SGLang derives the length from YaRN's original one and factor (`compat`)",
    upstream="https://github.com/sgl-project/sglang/issues/2943",
)
def derive_length(host: Callable[..., None], model_config: Any, context_length: int | None) -> None:
    """Around `_derive_context_length`: the longest context is what RoPE covers."""
    if is_ours(model_config):
        host_rope.extend(
            model_config.hf_text_config,
            context_length,
            flag="--context-length",
            extend=OVERRIDE_FLAG + " '{\"rope_scaling\": %s}'",
            override_flag=OVERRIDE_FLAG,
        )
    host(model_config, context_length)


def at_interval(config: Any) -> list[str]:
    """The kinds of layers of a config that does not list them."""
    interval = getattr(config, "full_attention_interval", 4)
    return [
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(config.num_hidden_layers)
    ]


def layers_block_type(config: Any) -> list[str]:
    """The kind of each layer, by SGLang's names."""
    if config.model_type not in MODEL_TYPES:
        return host_layers_block_type(config)
    return [LAYER_NAMES[layer_type] for layer_type in config.layer_types]


def mamba2_cache_params(config: Any) -> Any:
    """What SGLang computes its pools' sizes from: our pages, for our model."""
    # Other models, too, have a text model of these types.
    if config.model_type not in model_types() or not serves_ours():
        return host_mamba2_cache_params(config)
    from qwen3next_plugin.engines.sglang.state.pages import page_params

    return page_params(config)


TABLE.add(
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.layers_block_type",
        value=property(layers_block_type),
        group=When.WITH_OURS,
        reason="SGLang derives layers from full_attention_interval, which transformers 5 does not "
        "write",
        remove_when="SGLang reads layer_types",
    ),
    Attribute(
        target="sglang.srt.configs.qwen3_next.Qwen3NextConfig.mamba2_cache_params",
        value=property(mamba2_cache_params),
        group=When.WITH_OURS,
        reason="SGLang's pools hold a state per draft; ours hold one page per request",
        remove_when="a config can give its own cache parameters",
    ),
    Attribute(
        target="sglang.srt.server_args.ServerArgs.LANGUAGE_MODEL_ONLY_ARCHITECTURES",
        value=(*ServerArgs.LANGUAGE_MODEL_ONLY_ARCHITECTURES, *WRAPPERS, *TEXTS_ONLY),
        group=When.WITH_OURS,
        reason="--language-model-only serves a vision-language model without its tower",
        remove_when="SGLang has the flag for Qwen3.5",
        upstream="https://github.com/sgl-project/sglang/pull/37828",
    ),
)
