"""Requests that would end or block a server: refused with a 400 that names the field.

SGLang answers a ValueError of its tokenizer manager with a 400. What is not checked there reaches
the scheduler, where an error ends the server for every client.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from numbers import Real
from reprlib import repr as shortened
from typing import Any

import msgspec
import torch

from qwen3next_plugin.engines.sglang.model.streams_flags import EMBEDS, check_streams_request
from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.repairs.patterns import check_pattern

MAX_N = 128  # as in OpenAI's API
MAX_SEQUENCES = 4096  # prompts times n; SGLang's event loop serves nobody else while it queues them
MAX_LOGPROBS = 1000  # per token; each is a Python object in three processes
MAX_INT32 = 2**31 - 1  # SGLang's dtype for top_k
MAX_ROOM = 2**63 - 1  # the most that SGLang's router asks for
MAX_LOGPROBS_APART = 128  # per token that a prefill server hands over
# Beyond these, logits overflow fp32 at the lowest temperature, 1e-6.
MIN_REPETITION_PENALTY, MAX_BIAS = 1e-6, 1e20

# Fields that SGLang uses with another type than it declares.
TYPES: dict[str, Any] = {
    "stop_token_ids": set[int | None] | None,
    "logit_bias": dict[str | int, float] | None,
}
# Not checked by type: made by SGLang itself, or checked elsewhere.
UNTYPED = frozenset(
    (
        *("input_text", "input_ids", "input_embeds", "mm_inputs", "num_items_assigned"),
        *("sampling_params", "session_params", "positional_embed_overrides", "kv_hints"),
        *("time_stats", "custom_params", "watermark"),
    )
)
# SamplingParams sets these itself; with `is_normalized` it would check nothing.
INTERNAL = (
    *("is_normalized", "stop_strs", "stop_str_max_len"),
    *("stop_regex_strs", "stop_regex_max_len"),
)

VIDEO_DECODERS = ("torchcodec", "decord")  # packages with which SGLang reads videos

# Fields as /generate names them, and as OpenAI's API does.
PROMPT = "prompt (input_ids, text)"
TOP_LOGPROBS = "top_logprobs (top_logprobs_num, logprobs)"


def check_request(host: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Wrap `generate_request`: refuse requests that would end the scheduler."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        check(obj, manager.model_config.vocab_size, over_http=request is not None)
        if request is not None and manager.model_config.is_multimodal:
            check_videos(obj.video_data)
    return host(manager, obj, request)


def check_tokenised(host: Callable[..., Any], manager: Any, obj: Any, *args: Any) -> Any:
    """Wrap `_create_tokenized_object`: refuse a prompt that would end the scheduler.

    SGLang declares types of what it sends to the scheduler, and does not check them.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    made = host(manager, obj, *args)
    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        _check_types("", {name: getattr(made, name) for name in made.__struct_fields__}, type(made))
        check_positions(made.token_indices_to_pool, made.input_ids)
        check_embeds(made, manager.model_config.hidden_size)
        check_bootstrap_room(made.bootstrap_host, made.bootstrap_room)
        check_apart(made)
        check_streams_request(obj, manager.model_config.hf_config)
        if manager.model_config.is_multimodal:
            check_tower(obj)
    return made


def check(obj: Any, vocab_size: int, *, over_http: bool) -> None:
    """Check one `GenerateReqInput`, of one prompt or of many.

    Types and the number of answers are checked over HTTP only: a Python caller owns the engine.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    prompts, params = _prompts(obj), _each(obj.sampling_params)
    if over_http:
        _check_given(obj, params)
        count = len(prompts) or _embedded(obj.input_embeds)
        _check_answers(count, [each.get("n") for each in params])
    for prompt in prompts:
        _check_prompt(prompt, vocab_size)
    for number in _each(obj.top_logprobs_num):
        _check_range(TOP_LOGPROBS, number, 0, min(vocab_size, MAX_LOGPROBS))
    for start in _each(obj.logprob_start_len):
        _check_range("logprob_start_len", start, -1, MAX_INT32)
    for ids in _lists(obj.token_ids_logprob):
        _check_range("the length of token_ids_logprob", len(ids or ()), 0, MAX_LOGPROBS)
    for each in params:
        _check_sampling(each, vocab_size)


def check_videos(video_data: Any) -> None:
    """Check that a video reader is installed; without one SGLang answers with a 500.

    Raises:
        ValueError: names what to install.
    """
    if any(_each(video_data)) and not any(map(find_spec, VIDEO_DECODERS)):
        names = " or ".join(VIDEO_DECODERS)
        raise ValueError(
            f"video: nothing is installed that reads one; install {names} where the server runs"
        )


def check_positions(positions: list[int] | None, prompt: Sequence[int] | None) -> None:
    """Check the positions at which label tokens are scored; one step must read the whole prompt.

    Raises:
        ValueError: names the position and the prompt's length, or the flags that are missing.
    """
    from sglang.srt.runtime_context import get_memory, get_schedule

    if positions is None:
        return
    field = "token_indices_to_pool"
    if not positions:
        raise ValueError(f"{field} is empty; it needs at least one position")
    for position in (min(positions), max(positions)):
        _check_range(field, position, 0, len(prompt or ()) - 1)
    if not get_memory().disable_radix_cache or get_schedule().chunked_prefill_size != -1:
        raise ValueError(
            f"{field} needs a server with --disable-radix-cache --chunked-prefill-size -1: "
            "its positions count from where a step begins to read the prompt"
        )


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
    """Check one request of a model with a vision tower, which SGLang gives no embeddings.

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
    """Check one request of which a prefill and a decode server have a part each.

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
    _check_range("n", made.sampling_params.n, 1, 1)
    _check_range(TOP_LOGPROBS, made.top_logprobs_num, 0, MAX_LOGPROBS_APART)


def check_bootstrap_room(host: str | None, room: int | None) -> None:
    """Check the number by which a prefill and a decode server know a request.

    0 says that a server has not written yet. SGLang's own requests, of one server, have it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    _check_range("bootstrap_room", room, 0 if host == FAKE_BOOTSTRAP_HOST else 1, MAX_ROOM)


def _check_rows(field: str, rows: torch.Tensor, hidden_size: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != hidden_size:
        raise ValueError(
            f"{field} has shape {list(rows.shape)}; allowed is [tokens, {hidden_size}]"
        )
    if not rows.isfinite().all():
        raise ValueError(f"{field} has a value that is not finite in fp32")


def _check_given(obj: Any, params: list[Any]) -> None:
    """Check types that SGLang's own HTTP routes let through."""
    from sglang.srt.managers.io_struct import SessionParams
    from sglang.srt.runtime_context import get_observability
    from sglang.srt.sampling.sampling_params import SamplingParams

    _check_type("received_time", obj.received_time, float | None)
    _check_type("custom_labels", obj.custom_labels, dict[str, str] | None)
    for name in obj.custom_labels or ():
        allowed = get_observability().tokenizer_metrics_allowed_custom_labels or ()
        if name not in allowed:
            raise ValueError(
                f"custom_labels has {shortened(name)}; allowed are the names of the server's "
                f"--tokenizer-metrics-allowed-custom-labels: {', '.join(allowed) or 'none'}"
            )
    if obj.lora_id:
        raise ValueError(f"lora_id is {shortened(obj.lora_id)}; name an adapter in lora_path")
    if obj.session_params is not None:
        _check_types("session_params", obj.session_params, SessionParams)
    for each in params:
        _check_types("sampling_params", each, SamplingParams)
        for name in INTERNAL:
            if name in each:
                raise ValueError(f"{name} is SGLang's own; leave it out of sampling_params")


def _check_types(field: str, values: Any, kind: type[msgspec.Struct]) -> None:
    """Compare the fields of one of SGLang's structs with their declared types."""
    if not isinstance(values, dict):
        raise ValueError(f"{field} is {shortened(values)}; allowed is an object with fields")
    types = _types(kind)
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{field} has no field {name!r}; allowed are {', '.join(types)}")
        if value is not None and name not in UNTYPED:
            _check_type(f"{field}.{name}" if field else name, value, types[name])


@cache
def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {each.name: TYPES.get(each.name, each.type) for each in msgspec.structs.fields(kind)}


def _check_type(field: str, value: Any, kind: Any) -> None:
    """Check without conversion, so that neither `"1"` nor True is an integer; NumPy's 1 is."""
    from sglang.srt.utils.msgpack_utils import enc_hook

    try:
        msgspec.convert(msgspec.to_builtins(value, enc_hook=enc_hook), kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"{field} is {shortened(value)}: {error}") from None


def _each(value: Any) -> list[Any]:
    """A field's values: one for the whole request, or a list with one for each prompt."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _lists(ids: Any) -> list[Any]:
    """Token ids: one list for the whole request, or a list with one for each prompt."""
    return [ids] if ids and isinstance(ids[0], int) else ids or []


def _prompts(obj: Any) -> list[Any]:
    """The prompts, as text and as token ids; SGLang takes the latter where both are given."""
    if obj.text is None:
        return _lists(obj.input_ids)
    return _each(obj.text) + ([[]] if obj.input_ids == [] else _lists(obj.input_ids))


def _embedded(embeds: Any) -> int:
    """The number of prompts that are given as embeddings: one, or a list of them."""
    several = isinstance(embeds, list) and embeds and isinstance(embeds[0], list)
    return len(embeds) if several and embeds[0] and isinstance(embeds[0][0], list) else 1


def _check_answers(prompts: int, ns: Iterable[int | None]) -> None:
    _check_range("the number of prompts", prompts, 0, MAX_SEQUENCES)
    for n in ns:
        _check_range("n", n, 1, MAX_N)
        _check_range("the number of prompts times n", prompts * (n or 1), 0, MAX_SEQUENCES)


def _check_prompt(prompt: Any, vocab_size: int) -> None:
    if not prompt:
        raise ValueError(f"{PROMPT} is empty; a prompt needs at least one token")
    if not isinstance(prompt, str):
        _check_range(PROMPT, min(prompt), 0, vocab_size - 1)
        _check_range(PROMPT, max(prompt), 0, vocab_size - 1)


def _check_sampling(params: dict[str, Any], vocab_size: int) -> None:
    penalty = params.get("repetition_penalty")
    _check_range("repetition_penalty", penalty, MIN_REPETITION_PENALTY, 2)
    _check_range("top_k", params.get("top_k"), -1, MAX_INT32)
    for token in params.get("stop_token_ids") or ():
        _check_range("stop_token_ids", token, 0, vocab_size - 1)
    for bias in (params.get("logit_bias") or {}).values():
        _check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    for pattern in _each(params.get("stop_regex")):
        check_pattern(pattern)


def _check_range(field: str, value: float | None, low: float, high: float) -> None:
    """Refuse NaN, and values that are not numbers."""
    if value is not None and not (isinstance(value, Real) and low <= value <= high):
        raise ValueError(f"{field} is {value}; allowed are {low} to {high}")
