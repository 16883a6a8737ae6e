"""Qwen4-Exp under vLLM. With a vision tower, too, it is served as a text model."""

from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.extras import Additions, Models
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig

TRUNKS = ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration")


def check(config: Qwen3NextConfig, vllm_config: Any) -> None:
    """Refuse flags that it does not support."""
    if isinstance(config, Qwen4ExpConfig):
        from qwen3next_plugin.extras.qwen4_exp.vllm.flags import check_streams

        check_streams(config, vllm_config)


def complete(vllm_config: Any) -> None:
    """Leave its vision tower out."""
    from qwen3next_plugin.extras.qwen4_exp.vllm.flags import read_texts_only

    if vllm_config.model_config.architecture in TRUNKS:
        read_texts_only(vllm_config)


def kv_elements(config: Qwen3NextConfig) -> int:
    """What the indexer keeps, beside keys and values in vLLM's blocks."""
    if not isinstance(config, Qwen4ExpConfig) or not config.indexer_n_heads:
        return 0
    from qwen3next_plugin.extras.qwen4_exp.indexed_attention import index_elements

    return index_elements(config)


ADDS = Additions(
    models=Models(
        trunks=dict.fromkeys(TRUNKS, f"{__name__}.streams:Qwen4ExpForCausalLM"),
        drafters={"Qwen4ExpMTP": f"{__name__}.streams_mtp:Qwen4ExpMTP"},
        check=check,
        complete=complete,
        kv_elements=kv_elements,
    ),
)
