"""Qwen4-Exp under SGLang. With a vision tower, too, it is served as a text model."""

from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.extras import Additions, Models
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig

STREAMS, DRAFTER = "Qwen4ExpForCausalLM", "Qwen4ExpMTP"  # SGLang has no code for these names


def check(config: Qwen3NextConfig, server_args: Any) -> None:
    """Refuse flags that it does not support; log that its vision tower is left out."""
    if not isinstance(config, Qwen4ExpConfig):
        return
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
    from qwen3next_plugin.extras.qwen4_exp.sglang import flags

    flags.check_streams(config, server_args, on_cpu=without_gpu())
    flags.check_backends(config, server_args)
    flags.say_texts_only(model_config_of(server_args).hf_config)


def text_config(hf_config: Any) -> Any:
    """That of its text model, on a CPU."""
    from qwen3next_plugin.extras.qwen4_exp.sglang.config import for_texts

    return for_texts(hf_config)


def kv_elements(config: Qwen3NextConfig) -> int:
    """Rows of SGLang's pools hold parts of index keys: beside keys, and beside values."""
    if not isinstance(config, Qwen4ExpConfig) or not config.indexer_n_heads:
        return 0
    from qwen3next_plugin.extras.qwen4_exp.indexed_attention import dims_of_tokens

    return 2 * (dims_of_tokens(config) - config.head_dim)


ADDS = Additions(
    patches=("config", "requests"),
    models=Models(
        trunks={STREAMS: f"{__name__}.streams:{STREAMS}"},
        drafters={DRAFTER: f"{__name__}.streams_mtp:{DRAFTER}"},
        check=check,
        text_config=text_config,
        kv_elements=kv_elements,
    ),
)
