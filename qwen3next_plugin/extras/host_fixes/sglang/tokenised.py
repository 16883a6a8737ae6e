"""Checks tokenised requests: answers a 400 to those that would end SGLang's scheduler."""

from collections.abc import Callable
from reprlib import repr as shortened
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.host_fixes.logprobs import MOST, answer_tokens
from qwen3next_plugin.extras.host_fixes.sglang.requests import TOP_LOGPROBS, asked_logprobs
from qwen3next_plugin.extras.host_fixes.sglang.values import check_range, check_types

EMBEDS = ("input_embeds", "positional_embed_overrides")
MAX_ROOM = 2**63 - 1  # the most that SGLang's router asks for
MAX_LOGPROBS_APART = 128  # per token that a prefill server hands over


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    reason="SGLang's scheduler relies on types, positions and embeddings that are not checked",
    remove_when="SGLang refuses every request of test_hostile.py",
    upstream="https://github.com/sgl-project/sglang/issues/40728",
)
def check_tokenised(host: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    """Wrap `_create_tokenized_object`: refuse a prompt that would end the scheduler.

    SGLang declares the types of its messages to the scheduler, but does not check them.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    made = host(manager, obj, *args)
    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        check_types("", {name: getattr(made, name) for name in made.__struct_fields__}, type(made))
        check_tokens(made)
        check_positions(made)
        check_embeds(made, manager.model_config.hidden_size)
        check_min_p(made.sampling_params.min_p)
        check_processor(made.custom_logit_processor)
        check_bootstrap_room(made.bootstrap_host, made.bootstrap_room)
        check_apart(made)
        if made.return_logprob and (asked := asked_logprobs.get(None)) is not None:
            bound_logprobs(made, asked, manager.context_len)
        if manager.model_config.is_multimodal:
            check_tower(obj)
    return made


def check_tokens(made: Any) -> None:
    """Check that there is a token: a step without tokens ends the scheduler.

    Raises:
        ValueError: the text has no tokens.
    """
    given = made.input_ids or made.input_embeds is not None or made.session_params is not None
    if not given:
        raise ValueError("the prompt has no token: the tokenizer makes none of its text")


def check_positions(made: Any) -> None:
    """Check the positions at which label tokens are scored; one step must read the whole prompt.

    Raises:
        ValueError: names the field and what is allowed, or the flags that it needs.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule, get_spec

    if (positions := made.token_indices_to_pool) is None:
        return
    field = "token_indices_to_pool"
    if not positions:
        raise ValueError(f"{field} is empty; it needs at least one position")
    for position in (min(positions), max(positions)):
        check_range(field, position, 0, len(made.input_ids or ()) - 1)
    check_range(f"logprob_start_len with {field}", made.logprob_start_len, -1, min(positions))
    if (tokens := made.sampling_params.max_new_tokens) != 0:
        raise ValueError(f"max_new_tokens is {tokens}; with {field} allowed is 0")
    cached, chunk = not get_memory().disable_radix_cache, get_schedule().chunked_prefill_size
    if cached or chunk != -1 or get_spec().speculative_algorithm:
        raise ValueError(
            f"{field} needs a server with --disable-radix-cache --chunked-prefill-size -1 and "
            "without --speculative-algorithm: its positions count from where a step begins to read "
            "the prompt, and with drafts SGLang scores the last token alone"
        )


def bound_logprobs(made: Any, asked: list[int], context_len: int) -> None:
    """Bound the log-probabilities of one prompt and its answers; `asked`: of those before it.

    Raises:
        ValueError: names the field.
    """
    length, params = len(made.input_ids or ()), made.sampling_params
    start = made.logprob_start_len
    if start == -1:
        start = length if made.token_ids_logprob is None else length - 1
    room = max(1, context_len - length)
    each = 1 + (made.top_logprobs_num or 0) + len(made.token_ids_logprob or ())
    of_prompt = each * max(0, length - start)
    tokens = room if params.max_new_tokens is None else params.max_new_tokens
    may = answer_tokens(
        f"{TOP_LOGPROBS} or token_ids_logprob",
        prompt=of_prompt,
        each=each,
        n=params.n,
        tokens=tokens,
        room=room,
        most=MOST - sum(asked),
    )
    if may < tokens:
        params.max_new_tokens = may
    asked.append(params.n * (of_prompt + each * may))


def check_min_p(min_p: float) -> None:
    """Check min_p, with which SGLang cannot sample by a seed; also of generation_config.json.

    Raises:
        ValueError: names the flag.
    """
    from sglang.srt.runtime_context import get_exec

    if min_p and get_exec().deterministic.enable_deterministic_inference:
        raise ValueError(
            f"min_p is {min_p}; with --enable-deterministic-inference allowed is 0: SGLang's seeds "
            "do not go with it"
        )


def check_processor(processor: str | None) -> None:
    """Check that a custom logit processor can be read, which SGLang does in its scheduler.

    Raises:
        ValueError: names the field and what is wrong with it.
    """
    from sglang.srt.runtime_context import get_exec
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    if processor is None or not get_exec().features.enable_custom_logit_processor:
        return
    try:
        if not callable(CustomLogitProcessor.from_str(processor)):
            raise TypeError("it cannot be called")
    except Exception as error:  # of a client's own code, too
        raise ValueError(
            f"custom_logit_processor is {shortened(processor)}, which is no CustomLogitProcessor's "
            f"to_str(): {type(error).__name__}: {error}"
        ) from None


def check_embeds(made: Any, hidden_size: int) -> None:
    """Check embeddings of one prompt: all of them, or of some tokens.

    Raises:
        ValueError: names the field and the shape that is needed.
    """
    from sglang.srt.managers.embed_types import PositionalEmbeds

    if made.input_embeds is not None:
        try:
            embeds = torch.tensor(made.input_embeds, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"input_embeds is no [tokens, {hidden_size}] array: {error}") from None
        _check_rows("input_embeds", embeds, hidden_size)
        if made.session_params is not None:
            raise ValueError("input_embeds: a session continues token ids; leave one of both out")
    if (given := made.positional_embed_overrides) is None:
        return
    if not isinstance(given, PositionalEmbeds):
        raise ValueError(
            f"positional_embed_overrides is {shortened(given)}; only /v1/score and the engine in "
            "Python take them, as PositionalEmbeds"
        )
    if isinstance(given.embeds, torch.Tensor):
        _check_rows("positional_embed_overrides", given.embeds, hidden_size)


def check_tower(obj: Any) -> None:
    """Check one request of a model with a vision tower: SGLang passes it no embeddings.

    Raises:
        ValueError: names the field.
    """
    for name in EMBEDS:
        if getattr(obj, name) is not None:
            raise ValueError(
                f"{name}: a model with a vision tower takes token ids and images; send those, or "
                "start the server with --language-model-only"
            )


def check_apart(made: Any) -> None:
    """Check one request that a prefill and a decode server share.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    from sglang.srt.runtime_context import get_disagg

    if (mode := get_disagg().disaggregation_mode) == "null":
        return
    if not made.bootstrap_host or made.bootstrap_room is None:
        raise ValueError(
            f"bootstrap_host is {made.bootstrap_host!r} and bootstrap_room {made.bootstrap_room}; "
            f"a {mode} server needs both: ask the router"
        )
    # SGLang gives all answers of a prompt the same room.
    check_range("n", made.sampling_params.n, 1, 1)
    check_range(TOP_LOGPROBS, made.top_logprobs_num, 0, MAX_LOGPROBS_APART)


def check_bootstrap_room(host: str | None, room: int | None) -> None:
    """Check the number that identifies a request to its prefill and decode server.

    0 means that a server has not written yet; SGLang's own requests, of one server, use it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    check_range("bootstrap_room", room, 0 if host == FAKE_BOOTSTRAP_HOST else 1, MAX_ROOM)


def _check_rows(field: str, rows: torch.Tensor, hidden_size: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != hidden_size:
        raise ValueError(
            f"{field} has shape {list(rows.shape)}; allowed is [tokens, {hidden_size}]"
        )
    if not rows.isfinite().all():
        raise ValueError(f"{field} has a value that is not finite in fp32")
