"""SGLang's configuration class of Qwen3-Next, where it drops or misreads a newer config.json."""

from collections.abc import Callable
from typing import Any

from sglang.srt.configs.qwen3_next import Qwen3NextConfig as HostConfig

from qwen3next_plugin.engines.sglang.names import MODEL_TYPE

LAYER_NAMES = {"full_attention": "attention", "linear_attention": "linear_attention"}

host_layers_block_type = HostConfig.layers_block_type.fget
host_mamba2_cache_params = HostConfig.mamba2_cache_params.fget


def keep_config(host: Callable[..., None], config: Any, *args: Any, **given: Any) -> None:
    """Keep `layer_types` and `rope_parameters`, which SGLang drops.

    SGLang wants `full_attention_interval`, which transformers 5 no longer writes, and assumes a
    rope theta of 10,000 where the top level has none. `rope_parameters` is set afterwards because
    transformers checks YaRN's against `max_position_embeddings`, which SGLang sets too late.
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


def layers_block_type(config: Any) -> list[str]:
    """The kind of each layer, by SGLang's names."""
    if config.model_type != MODEL_TYPE:
        return host_layers_block_type(config)
    return [LAYER_NAMES[layer_type] for layer_type in config.layer_types]


def mamba2_cache_params(config: Any) -> Any:
    """What SGLang computes its pools' sizes from: our pages, for our model."""
    if config.model_type != MODEL_TYPE:
        return host_mamba2_cache_params(config)
    from qwen3next_plugin.engines.sglang.state.pages import page_params

    return page_params(config)
