"""stop_regex: patterns that SGLang's scheduler matches at each step."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.names import serves_ours

# Of CPU time, for one step of one request: normal patterns take microseconds, and a busy machine
# may stand still for longer.
REGEX_SECONDS = 0.25
LOOKS = 5  # at the CPU time, before it can be up


def check_pattern(pattern: str) -> None:
    """Check that a stop_regex compiles.

    Raises:
        ValueError: names the pattern and what is wrong with it.
    """
    from sglang.srt.sampling.sampling_params import MAX_STOP_REGEX_LEN

    if len(pattern) > MAX_STOP_REGEX_LEN:  # SGLang refuses it, and says so
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"stop_regex {pattern!r} is no regular expression: {error}") from None


def limit_regex(host: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """Wrap `_check_str_based_finish`: abort a request whose stop_regex takes too long to match.

    The time is limited while matching: no check of a pattern finds exactly those that backtrack.
    The first tensor-parallel rank decides: one that aborts a request alone would leave the others
    waiting in the next step.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    patterns = req.sampling_params.stop_regex_strs
    if not patterns or not serves_ours():
        return host(req, new_accepted_len)
    ranks, done, late = _ranks(), False, False
    if ranks.rank_in_group == 0:
        try:
            with _time_limit(REGEX_SECONDS):
                done = host(req, new_accepted_len)
        except TimeoutError:
            late = True
    if ranks.world_size > 1:
        late = bool(ranks.broadcast(torch.tensor([int(late)]), src=0)[0])
    if late:
        message = f"stop_regex {patterns} takes over {REGEX_SECONDS} s of CPU time; simplify it"
        req.finished_reason = FINISH_ABORT(message, 400, "BadRequestError")
        return True
    return done if ranks.rank_in_group == 0 else host(req, new_accepted_len)


def _ranks() -> Any:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_group


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, also in the middle of `re.search`.

    An alarm of CPU time would count all threads, of which those that wait for work compute.
    """
    end = time.thread_time() + seconds

    def look(*_: Any) -> None:
        if time.thread_time() >= end:
            signal.setitimer(signal.ITIMER_REAL, 0)  # it may come too late to be disarmed below
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds / LOOKS, seconds / LOOKS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
