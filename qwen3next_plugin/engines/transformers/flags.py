"""Arguments that our loop and our passes accept; refusals name the argument and the fix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.config import MAX_SPECULATIVE_TOKENS, check_before_engine, quantization_of
from qwen3next_plugin.config.json_files import read_object
from qwen3next_plugin.engines.transformers.state.cache import RowCache
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS
from qwen3next_plugin.model.checkpoint import headers
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.quantisation.in_panels import is_packed

INVARIANT = "QWEN3NEXT_BATCH_INVARIANT=1"
DRAFTS = 3  # num_assistant_tokens, where it is not given
# Arguments and settings that our loop does not support → the fix.
REFUSED: Mapping[str, str] = {
    "assistant_model": "the MTP head drafts already; leave assistant_model out",
    "prompt_lookup_num_tokens": "the MTP head drafts already; leave prompt_lookup_num_tokens out",
    "assistant_early_exit": "the MTP head drafts already; leave assistant_early_exit out",
    "assistant_ensemble_weight": "it changes the text; leave assistant_ensemble_weight out",
    "custom_generate": "it brings a decoding loop of its own; leave custom_generate out",
    "past_key_values": "it cannot go back to an earlier token; leave past_key_values out",
    "cache": "it cannot go back to an earlier token; leave cache out",
    "cache_implementation": "the plugin brings its own cache; leave cache_implementation out",
    "inputs_embeds": "the MTP head reads token ids; pass input_ids",
    "prefill_chunk_size": "a prompt is read at once; leave prefill_chunk_size out",
    "penalty_alpha": "contrastive search is not supported; leave penalty_alpha out",
    "dola_layers": "DoLa is not supported; leave dola_layers out",
    "output_attentions": "steps hold drafts, too; leave output_attentions out",
    "output_hidden_states": "steps hold drafts, too; leave output_hidden_states out",
    "synced_gpus": "ranks would draft differently; leave synced_gpus out",
}
TAKEN = {  # accepted arguments for the model; the host's cache stays empty
    *("position_ids", "attention_mask", "past_key_values", "cache", "use_cache", "logits_to_keep"),
    *("tokenizer", "assistant_tokenizer"),
}
BATCHED = {  # have a state, or a function that must not see unfinished rows
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
}
MASKED = ("sdpa", "eager")  # attentions that accept a separate mask for each row


class RequestError(ValueError):
    """An argument that `use_mtp=True` or INVARIANT does not support; names it, and the fix."""


def check_files(model: str | Path | None) -> None:
    """Refuse a checkpoint with a damaged file; one of a hub is not checked.

    Raises:
        ConfigError, CheckpointError: name the file and what is wrong.
    """
    if model is None or not (folder := Path(model)).is_dir():
        return
    check_before_engine(folder)
    if (folder / "config.json").is_file() and is_packed(quantization_of(folder)):
        raise CheckpointError(
            f"{folder} is packed for vLLM and SGLang on a CPU; load the checkpoint that "
            f"`qwen3next pack` read"
        )
    headers.check_files(folder)
    index = folder / headers.INDEX
    if index.is_file() and not isinstance(
        read_object(index, CheckpointError).get("metadata"), dict
    ):
        raise CheckpointError(
            f'{index} has no metadata, which transformers reads; add "metadata": {{}} to it'
        )


def given(name: str, arguments: Mapping[str, Any], configs: Sequence[Any]) -> Any:
    """A setting: the argument, or the first config that has it."""
    found = (arguments.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def check_pass(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse what a pass with the engines' bits does not support.

    Raises: RequestError: an argument or a setting, with the fix.
    """
    if model.training and torch.is_grad_enabled():
        raise RequestError(
            f"{INVARIANT}: the engines' kernels have no gradients; call model.eval() or use "
            f"torch.no_grad()"
        )
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        asked = given.get(name)
        if asked if asked is not None else getattr(model.config, name, False):
            raise RequestError(f"{INVARIANT} with {name}: it is not computed; leave it out")
    for name in ("past_key_values", "cache"):
        if not isinstance(given.get(name), RowCache | None):
            raise RequestError(
                f"{INVARIANT} with {name}: the host's cache cannot hold our state; leave it out, "
                f"or call generate"
            )


def mask(attention_mask: Any, x: Tensor) -> Tensor:
    """Which tokens of a batch are not padding. Shapes: x [B, n, D], returns [B, n] bool

    Raises: RequestError: a mask of another kind.
    """
    if attention_mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != x.shape[:2]:
        raise RequestError(f"{INVARIANT}: attention_mask is one number for each token, or left out")
    return attention_mask.bool()


def one_axis(position_ids: Tensor | None, x: Tensor) -> Tensor | None:
    """The positions of each token of a text. Shapes: position_ids [B, n] or [axes, B, n]"""
    if position_ids is None:
        return None
    positions = position_ids[0] if position_ids.ndim == 3 else position_ids
    return positions.expand(x.shape[:2])  # Qwen3.5's axes are equal


def asking(drafts: Any) -> str:
    """The setting that makes `generate` run our loop, for errors."""
    return "use_mtp=True" if drafts else INVARIANT


def refuse_synced(synced_gpus: bool, num_drafts: int) -> None:
    """Refuse ranks that wait for each other in every step, as transformers' ZeRO-3 and FSDP do.

    Raises: RequestError
    """
    if synced_gpus:
        raise RequestError(
            f"{asking(num_drafts)} under ZeRO-3 or FSDP: ranks would draft differently, and wait "
            f"for each other forever; generate on one rank, or without it"
        )


def check(model: Any, arguments: Mapping[str, Any], configs: Sequence[Any]) -> None:
    """Refuse what our loop does not support, before anything is computed.

    Raises:
        CheckpointError: there is no MTP head.
        RequestError: an argument or a setting, with the fix.
        NotImplementedError: no kernels run on the model's device.
    """
    drafts = given("use_mtp", arguments, configs)
    asked = asking(drafts)
    if drafts and model.mtp is None:
        raise CheckpointError(
            "use_mtp=True: this checkpoint has no mtp.* tensors (a save through transformers "
            "without the plugin drops them); leave use_mtp out, or load the released checkpoint"
        )
    for name, fix in REFUSED.items():
        value = given(name, arguments, configs)
        if value is not None and value is not False:
            raise RequestError(f"{asked} with {name}: {fix}")
    if (beams := given("num_beams", arguments, configs) or 1) > 1:
        raise RequestError(f"{asked} with num_beams={beams}: beam search is not supported; use 1")
    if given("use_cache", arguments, configs) is False:
        raise RequestError(f"{asked} with use_cache=False: our loop needs the cache; leave it out")
    num_drafts = given("num_assistant_tokens", arguments, configs)
    if num_drafts is not None and not 1 <= num_drafts <= MAX_SPECULATIVE_TOKENS:
        raise RequestError(
            f"num_assistant_tokens={num_drafts}: the MTP head drafts 1 to "
            f"{MAX_SPECULATIVE_TOKENS} tokens"
        )
    if model.dtype not in ACTIVATIONS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in ACTIVATIONS)
        raise RequestError(f"{asked} with {model.dtype}: load the model in one of {names}")
    for device in {parameter.device.type for parameter in model.parameters()} - {"meta"}:
        dispatch.backend("gated_delta_net", device)
    attention = model.config._attn_implementation
    if drafts and attention not in MASKED:
        raise RequestError(
            f"use_mtp=True with attn_implementation={attention!r}: rows of a batch need a mask "
            f"each; load the model with one of {', '.join(MASKED)}"
        )


def prompt(
    input_ids: Tensor, processors: Sequence[Any], arguments: Mapping[str, Any], asked: str
) -> tuple[Tensor, list[int]]:
    """The positions of prompts, and how many columns of padding are before each; checked.

    Shapes: input_ids [B, T], returns positions [B, T]

    Raises: RequestError: padding behind a token, an empty prompt, processors that need a whole
        batch, or an argument for the model that is none of TAKEN.
    """
    for name in arguments.keys() - TAKEN:
        raise RequestError(f"{asked} with {name}: our loop does not take it; leave it out")
    B, T = input_ids.shape
    if T == 0:
        raise RequestError(f"{asked}: an empty prompt has nothing to draft from")
    attention_mask = arguments.get("attention_mask")
    padding = [0] * B
    if attention_mask is not None:
        is_token = attention_mask.bool()
        if not is_token[:, -1].all() or (is_token[:, :-1] > is_token[:, 1:]).any():
            raise RequestError(
                f"{asked}: a prompt has padding behind a token; use a tokenizer with "
                "padding_side='left'"
            )
        padding = (~is_token).sum(1).tolist()
    for processor in processors if B > 1 else ():
        if (name := type(processor).__name__) in BATCHED:
            raise RequestError(
                f"{asked} with {name} and {B} prompts: it needs all rows at the same token; "
                f"pass one prompt at a time"
            )
    positions = arguments["position_ids"]
    positions = positions[0] if positions.ndim == 3 else positions  # Qwen3.5's axes are equal
    return positions.expand(B, T), padding
