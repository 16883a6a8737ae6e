"""Requests that would end or block a server: refused with a 400 that names the field.

SGLang answers a ValueError of its tokenizer manager with a 400. What is not checked there reaches
the scheduler, where an error ends the server for every client.
"""

import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from qwen3next_plugin.engines.sglang.names import is_ours

MAX_N = 128  # as in OpenAI's API
MAX_SEQUENCES = 4096  # prompts times n; SGLang's event loop serves nobody else as it queues them
MAX_LOGPROBS = 1000  # per token; each is a Python object in three processes
MAX_INT32 = 2**31 - 1  # SGLang's dtype for top_k
# Beyond these, logits overflow fp32 at the lowest temperature, 1e-6.
MIN_REPETITION_PENALTY, MAX_BIAS = 1e-6, 1e20
REGEX_SECONDS = 0.25  # for one step of one request; a sane pattern takes microseconds

VIDEO_DECODERS = ("torchcodec", "decord")  # packages with which SGLang reads videos

# Fields as /generate names them, and as OpenAI's API does.
PROMPT = "prompt (input_ids, text)"
TOP_LOGPROBS = "top_logprobs (top_logprobs_num, logprobs)"


def check_request(host: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """Wrap `generate_request`: refuse what its scheduler would not survive."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput) and is_ours(manager.model_config):
        check(obj, manager.model_config.vocab_size, over_http=request is not None)
        if request is not None and manager.model_config.is_multimodal:
            check_videos(obj.video_data)
    return host(manager, obj, request)


def check(obj: Any, vocab_size: int, *, over_http: bool) -> None:
    """Check one `GenerateReqInput`, of one prompt or of many.

    The number of answers is limited over HTTP only: whoever calls the engine in Python owns it.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    prompts, params = _prompts(obj), _each(obj.sampling_params)
    if over_http:
        _check_answers(len(prompts), [each.get("n") for each in params])
    for prompt in prompts:
        _check_prompt(prompt, vocab_size)
    for number in _each(obj.top_logprobs_num):
        _check_range(TOP_LOGPROBS, number, 0, min(vocab_size, MAX_LOGPROBS))
    for ids in _lists(obj.token_ids_logprob):
        _check_range("the length of token_ids_logprob", len(ids or ()), 0, MAX_LOGPROBS)
    for each in params:
        _check_sampling(each, vocab_size)


def check_videos(video_data: Any) -> None:
    """Check that what reads an encoded video is installed; without, SGLang answers with a 500.

    Raises:
        ValueError: names what to install.
    """
    if any(_each(video_data)) and not any(map(find_spec, VIDEO_DECODERS)):
        names = " or ".join(VIDEO_DECODERS)
        raise ValueError(
            f"video: nothing is installed that reads one; install {names} where the server runs"
        )


def _each(value: Any) -> list[Any]:
    """A field's values: one for the whole request, or a list with one for each prompt."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _lists(ids: Any) -> list[Any]:
    """Token ids: one list for the whole request, or a list with one for each prompt."""
    return [ids] if ids and isinstance(ids[0], int) else ids or []


def _prompts(obj: Any) -> list[Any]:
    """The prompts, as text or as token ids."""
    return _lists(obj.input_ids) if obj.text is None else _each(obj.text)


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
        _check_regex(pattern)


def _check_range(field: str, value: float | None, low: float, high: float) -> None:
    """NaN is in no range."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{field} is {value}; allowed are {low:.15g} to {high:.15g}")


def _check_regex(pattern: str) -> None:
    from sglang.srt.sampling.sampling_params import MAX_STOP_REGEX_LEN

    if len(pattern) > MAX_STOP_REGEX_LEN:  # SGLang refuses it, and says so
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex {pattern!r} is no regular expression: {error}") from None


def limit_regex(host: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """Wrap `_check_str_based_finish`: abort a request whose stop_regex takes too long to match.

    Time is limited as it matches, because no check of a pattern finds just those that backtrack.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.runtime_context import get_server_args

    patterns = req.sampling_params.stop_regex_strs
    if not patterns or not is_ours(model_config_of(get_server_args())):
        return host(req, new_accepted_len)
    try:
        with _time_limit(REGEX_SECONDS):
            return host(req, new_accepted_len)
    except TimeoutError:
        message = f"stop_regex {patterns} takes longer than {REGEX_SECONDS} s to match; simplify it"
        req.finished_reason = FINISH_ABORT(message, 400, "BadRequestError")
        return True


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, also in the middle of `re.search`."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
