"""Requests that would end or block a server: refused with a 400 that names the field.

SGLang answers a ValueError of its tokenizer manager with a 400. What is not checked there reaches
the scheduler, where an error ends the server for every client.
"""

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from importlib.util import find_spec
from reprlib import repr as shortened
from typing import Any

from qwen3next_plugin.engines.sglang.names import is_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.host_fixes.sglang.patterns import check_pattern
from qwen3next_plugin.extras.host_fixes.sglang.values import check_range, check_type, check_types

MAX_N = 128  # as in OpenAI's API
MAX_SEQUENCES = 4096  # prompts times n; SGLang's event loop is blocked while it queues them
MAX_LOGPROBS = 1000  # per token; each is a Python object in three processes
MAX_INT32 = 2**31 - 1  # SGLang's dtype for top_k
# Beyond these, logits overflow fp32 at the lowest temperature, 1e-6.
MIN_REPETITION_PENALTY, MAX_BIAS = 1e-6, 1e20

# SamplingParams sets these itself; with `is_normalized` it would check nothing.
INTERNAL = (
    *("is_normalized", "stop_strs", "stop_str_max_len"),
    *("stop_regex_strs", "stop_regex_max_len"),
)

# Log-probabilities asked for by the prompts of one HTTP request; unset for Python callers.
asked_logprobs: ContextVar[list[int]] = ContextVar("asked_logprobs")

HEALTH = ("/health", "/health_generate")  # SGLang sends itself requests there
VIDEO_DECODERS = ("torchcodec", "decord")  # packages with which SGLang reads videos

# Fields as /generate names them, and as OpenAI's API does.
PROMPT = "prompt (input_ids, text)"
TOP_LOGPROBS = "top_logprobs (top_logprobs_num, logprobs)"


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
    reason="SGLang accepts requests that end its scheduler or fill its queue for hours",
    remove_when="SGLang refuses every request of test_hostile.py",
    upstream="https://github.com/sgl-project/sglang/issues/36855",
)
def check_request(host: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Wrap `generate_request`: refuse requests that would end the scheduler."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        check(obj, manager.model_config.vocab_size, over_http=request is not None)
        if request is not None:
            asked_logprobs.set([])
            check_bootstrap_host(obj.bootstrap_host, manager, request.url.path)
        if request is not None and manager.model_config.is_multimodal:
            check_videos(obj.video_data)
    return host(manager, obj, request)


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
        check_range(TOP_LOGPROBS, number, 0, min(vocab_size, MAX_LOGPROBS))
    for start in _each(obj.logprob_start_len):
        check_range("logprob_start_len", start, -1, MAX_INT32)
    for ids in _lists(obj.token_ids_logprob):
        check_range("the length of token_ids_logprob", len(ids or ()), 0, MAX_LOGPROBS)
    for each in params:
        _check_sampling(each, vocab_size)


def check_bootstrap_host(hosts: Any, manager: Any, path: str) -> None:
    """Refuse the address that means "no prefill server", except in a server's own checks.

    A decode server would answer from uninitialised memory.

    Raises:
        ValueError: names the field.
    """
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    own = manager.server_status == ServerStatus.Starting or path in HEALTH
    if FAKE_BOOTSTRAP_HOST in _each(hosts) and not own:
        raise ValueError(
            f"bootstrap_host {FAKE_BOOTSTRAP_HOST} is SGLang's own; name a prefill server"
        )


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


def _check_given(obj: Any, params: list[Any]) -> None:
    """Check types that SGLang's own HTTP routes let through."""
    from sglang.srt.managers.io_struct import SessionParams
    from sglang.srt.runtime_context import get_observability
    from sglang.srt.sampling.sampling_params import SamplingParams

    check_type("received_time", obj.received_time, float | None)
    check_type("custom_labels", obj.custom_labels, dict[str, str] | None)
    for name in obj.custom_labels or ():
        allowed = get_observability().tokenizer_metrics_allowed_custom_labels or ()
        if name not in allowed:
            raise ValueError(
                f"custom_labels has {shortened(name)}; allowed are the names of the server's "
                f"--tokenizer-metrics-allowed-custom-labels: {', '.join(allowed) or 'none'}"
            )
    if obj.mm_hashes:
        raise ValueError("mm_hashes is SGLang's own over HTTP: an image could take another's name")
    for name in ("image_data", "video_data", "audio_data"):
        if any(isinstance(each, dict) and "format" in each for each in _flat(getattr(obj, name))):
            raise ValueError(f"{name} has what a processor made; allowed are files, links and data")
    if obj.lora_id:
        raise ValueError(f"lora_id is {shortened(obj.lora_id)}; name an adapter in lora_path")
    if obj.session_params is not None:
        check_types("session_params", obj.session_params, SessionParams)
    for each in params:
        check_types("sampling_params", each, SamplingParams)
        for name in INTERNAL:
            if name in each:
                raise ValueError(f"{name} is SGLang's own; leave it out of sampling_params")


def _each(value: Any) -> list[Any]:
    """A field's values: one for the whole request, or a list with one for each prompt."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _flat(value: Any) -> Iterator[Any]:
    """A field's values, in lists at any depth."""
    for each in _each(value):
        yield from _flat(each) if isinstance(each, list) else [each]


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
    check_range("the number of prompts", prompts, 0, MAX_SEQUENCES)
    for n in ns:
        check_range("n", n, 1, MAX_N)
        check_range("the number of prompts times n", prompts * (n or 1), 0, MAX_SEQUENCES)


def _check_prompt(prompt: Any, vocab_size: int) -> None:
    if not prompt:
        raise ValueError(f"{PROMPT} is empty; a prompt needs at least one token")
    if not isinstance(prompt, str):
        check_range(PROMPT, min(prompt), 0, vocab_size - 1)
        check_range(PROMPT, max(prompt), 0, vocab_size - 1)


def _check_sampling(params: dict[str, Any], vocab_size: int) -> None:
    penalty = params.get("repetition_penalty")
    check_range("repetition_penalty", penalty, MIN_REPETITION_PENALTY, 2)
    check_range("top_k", params.get("top_k"), -1, MAX_INT32)
    for token in params.get("stop_token_ids") or ():
        check_range("stop_token_ids", token, 0, vocab_size - 1)
    for bias in (params.get("logit_bias") or {}).values():
        check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    for pattern in _each(params.get("stop_regex")):
        check_pattern(pattern)
