"""stop_regex: patterns that SGLang's scheduler matches at each step."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

from qwen3next_plugin.engines.sglang.names import serves_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.host_fixes import processes
from qwen3next_plugin.extras.host_fixes.sglang.grammars import DEAR, failure, of_any_rank, ranks

BUDGET = "qwen3next_budget"  # of SGLang's Req
LOOKS = 5  # looks at the CPU time before it can be up
_BUDGETS: WeakValueDictionary[tuple[str, ...], processes.Budget] = WeakValueDictionary()


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


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.schedule_batch.Req._check_str_based_finish",
    reason="a stop_regex that backtracks, or a dear grammar, blocks the scheduler forever",
    remove_when="SGLang and its libraries of grammars match with a time limit",
    upstream="https://github.com/sgl-project/sglang/pull/28203",
)
def end_dear(host: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """Wrap `_check_str_based_finish`: abort a request whose stop_regex or grammar is too dear.

    Limits the time of matching, because no check of a pattern finds exactly those that backtrack.
    Only the first tensor-parallel rank matches patterns. If any rank ends a request, all do: a rank
    that aborts alone would leave the others waiting in the next step.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    patterns = req.sampling_params.stop_regex_strs
    if not (patterns or req.grammar) or not serves_ours():
        return host(req, new_accepted_len)
    done, failed = False, failure(req)
    first = ranks().rank_in_group == 0
    if first and patterns:
        done, late = _match(host, req, new_accepted_len)
        failed = f"stop_regex {patterns} {processes.TOO_DEAR}: simplify it" if late else failed
    if of_any_rank(failed is not None):
        req.finished_reason = FINISH_ABORT(failed or DEAR, 400, "BadRequestError")
        return True
    return done if first and patterns else host(req, new_accepted_len)


def _match(host: Callable[..., bool], req: Any, tokens: int) -> tuple[bool, bool]:
    """Whether the answer ends here; whether its patterns are over their budget."""
    patterns = tuple(req.sampling_params.stop_regex_strs)
    budget = _BUDGETS.setdefault(patterns, processes.Budget())
    vars(req)[BUDGET] = budget  # shared by all requests with these patterns
    taken, began = budget.take(tokens), time.thread_time()
    try:
        with _time_limit(taken):
            return host(req, tokens), False
    except TimeoutError:
        return False, True
    finally:
        budget.settle(taken, time.thread_time() - began, tokens)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, also in the middle of `re.search`.

    An alarm of CPU time would count all threads, including those that spin while they wait.
    """
    end, live = time.thread_time() + seconds, True

    def look(*_: Any) -> None:
        nonlocal live
        if live and time.thread_time() >= end:
            live = False
            signal.setitimer(signal.ITIMER_REAL, 0)  # it may come too late to be disarmed below
            raise TimeoutError

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, seconds / LOOKS + 1e-6, seconds / LOOKS + 1e-6)
    try:
        yield
    finally:
        live = False  # on a busy machine the last alarm may come later
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Even after this; SIG_DFL would then end the scheduler.
        signal.signal(signal.SIGALRM, before if callable(before) else lambda *_: None)
