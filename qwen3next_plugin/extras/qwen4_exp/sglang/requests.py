"""Requests that Qwen4-Exp cannot answer."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch

MEDIA = "image_data, video_data, audio_data"
EMBEDS = ("input_embeds", "positional_embed_overrides")


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    reason="SGLang ignores images of a text model, and knows nothing of n-grams",
    remove_when="a model can refuse a request",
)
def check_request(host: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    """Wrap `_create_tokenized_object`: refuse what the model does not read."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    made = host(manager, obj, *args)
    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        check_streams_request(obj, manager.model_config.hf_config)
    return made


def check_streams_request(obj: Any, hf_config: Any) -> None:
    """Refuse images where the tower is left out, and embeddings of tokens that have n-grams.

    Raises:
        ValueError: names the field; SGLang would ignore images.
    """
    if getattr(hf_config, "served_for_texts", None) and obj.contains_mm_input():
        raise ValueError(f"{MEDIA}: this model is served for texts; leave them out")
    for name in EMBEDS if getattr(hf_config, "ple_layer_ids", None) else ():
        if getattr(obj, name) is not None:
            raise ValueError(f"{name}: this model's n-grams are of tokens; send token ids")
