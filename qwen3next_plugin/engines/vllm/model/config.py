"""vLLM's config of the family: RoPE overrides, a flag for them, the longest context, KV's dtype."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.platforms import current_platform

from qwen3next_plugin.config import (
    ConfigError,
    check_before_engine,
    check_extra,
    host_rope,
    naming_file,
)
from qwen3next_plugin.engines.vllm.names import OVERRIDE_FLAG, serves
from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.model.checkpoint.headers import check_files

ROPE_FLAG = "--rope-scaling"


@patch(
    When.REGISTERED,
    "vllm.engine.arg_utils.maybe_override_with_speculators",
    reason="a damaged config.json ends vLLM in errors that name no file, or makes it list the "
    "layers of any number of them",
    remove_when="vLLM checks the file's types, and names it",
)
def check_file(host: Callable[..., Any], model: str, *args: Any, **given: Any) -> Any:
    """Around `maybe_override_with_speculators`, the first that reads a config.json: check it."""
    check_before_engine(model)
    return host(model, *args, **given)


@patch(
    When.REGISTERED,
    "vllm.config.model.get_config",
    reason="errors about fields that only vLLM reads name no file",
    remove_when="vLLM names it",
)
def name_file(host: Callable[..., Any], model: str, *args: Any, **given: Any) -> Any:
    """Around `get_config`: an error about a config.json names the file, or the extra it needs."""
    with naming_file(model, "vLLM", OVERRIDE_FLAG):
        config = host(model, *args, **given)
    if current_platform.is_cpu():
        check_extra(getattr(config, "model_type", None))
    return config


@patch(
    When.REGISTERED,
    "vllm.engine.arg_utils.resolve_kv_cache_dtype_string",
    reason="on a CPU, vLLM rounds keys and values to FP8 where a config.json of modelopt says "
    "so, and reads no scales",
    remove_when="vLLM reads them on a CPU",
)
def keep_kv_dtype(host: Callable[..., str], kv_cache_dtype: str, model_config: ModelConfig) -> str:
    """Around `resolve_kv_cache_dtype_string`: on a CPU only the flag asks for FP8."""
    if current_platform.is_cpu() and serves(model_config.hf_config):
        return kv_cache_dtype
    return host(kv_cache_dtype, model_config)


@patch(
    When.REGISTERED,
    "vllm.config.model.ModelConfig._apply_dict_overrides",
    reason="an override of rope_scaling replaces all of RoPE: vLLM serves with another base and "
    "all dims rotated; and it has no effect where the text model is nested",
    remove_when="vLLM merges it, at either level",
    upstream="https://github.com/vllm-project/vllm/pull/54289",
)
def merge_overrides(
    host: Callable[..., None], model_config: ModelConfig, config: Any, overrides: dict[str, Any]
) -> None:
    """Around `_apply_dict_overrides`: an override of RoPE changes only the fields it names."""
    if not serves(config):
        host(model_config, config, overrides)
        return
    rest, given = host_rope.split(overrides)
    host(model_config, config, rest)
    if given:
        host_rope.override(config.get_text_config(), given, model_config.hf_overrides)


@patch(
    When.REGISTERED,
    "vllm.config.model.ModelConfig.get_model_arch_config",
    reason="vLLM ignores YaRN's factor in the longest context, and asks for "
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
    remove_when="vLLM derives the length from YaRN's original one and factor (`compat`)",
    upstream="https://github.com/vllm-project/vllm/pull/56446",
)
def derive_length(host: Callable[..., Any], model_config: ModelConfig) -> Any:
    """Around `get_model_arch_config`: the longest context is what RoPE covers."""
    if serves(model_config.hf_config):
        if getattr(model_config.hf_text_config, "dtype", None) is None:
            check_files(Path(model_config.model))  # vLLM then looks for it in headers
        asked, flag = model_config.max_model_len, "--max-model-len"
        if model_config.runner == "draft":
            flag = "max_model_len of --speculative-config"
        host_rope.extend(
            model_config.hf_text_config,
            asked if asked != -1 else None,  # -1: as long as memory allows
            flag=flag,
            extend=f"{ROPE_FLAG} '%s'",
            override_flag=OVERRIDE_FLAG,
        )
    with naming_file(model_config.model, "vLLM", OVERRIDE_FLAG):
        return host(model_config)


@patch(
    When.REGISTERED,
    "vllm.engine.arg_utils.EngineArgs.add_cli_args",
    reason="vLLM has dropped --rope-scaling, which Qwen's model cards name",
    remove_when="the cards no longer name it",
    upstream="https://github.com/vllm-project/vllm/pull/28006",
)
def offer_rope_scaling(host: Callable[..., Any], parser: Any) -> Any:
    """Around `EngineArgs.add_cli_args`: the flag that Qwen's model cards name."""
    parser = host(parser)
    parser.add_argument(
        ROPE_FLAG,
        type=_rope_scaling,
        help=f"RoPE of a longer context, as JSON: '{host_rope.EXAMPLE}'. What it leaves out is as "
        "in config.json. The same as rope_scaling in --hf-overrides. From qwen3next_plugin.",
    )
    return parser


@patch(
    When.REGISTERED,
    "vllm.engine.arg_utils.EngineArgs.from_cli_args",
    reason="vLLM has dropped --rope-scaling, which Qwen's model cards name",
    remove_when="the cards no longer name it",
    upstream="https://github.com/vllm-project/vllm/pull/28006",
)
def take_rope_scaling(host: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Around `EngineArgs.from_cli_args`: make the flag an override of the config."""
    if given := getattr(args, "rope_scaling", None):
        overrides = args.hf_overrides or {}
        if host_rope.split(overrides)[1] is not None:
            raise ConfigError(f"{ROPE_FLAG}: {OVERRIDE_FLAG} has RoPE, too; give one of the two")
        args = argparse.Namespace(**vars(args))
        args.hf_overrides = overrides | {"rope_scaling": given}
    return host(cls, args)


def _rope_scaling(text: str) -> dict[str, Any]:
    try:
        return host_rope.parse(text, ROPE_FLAG)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
