"""A case: two ways to compute the same, checked against each other, then timed in turn."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.report import RedCheckError

TOLERANCE = 2e-2  # of upstream and plugin against each other, both bf16
PAIRS, QUICK_PAIRS = 30, 2

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """The two ways to run it, and how many calls visit all pages once."""

    name: str
    plugin: Call
    upstream: Call
    calls: int = 1
    in_quick: bool = True


def timed(case: Case, pairs: int) -> dict[str, float]:
    """Check while warming up, then time pairs; the ratio is the median of the pairs' ratios."""
    for _ in range(2 * case.calls):  # so that every page has a past
        error = relative_error(case.plugin(), case.upstream())
        if not error <= TOLERANCE:
            raise RedCheckError(f"{case.name}: plugin and upstream differ by {error:.1e}")
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(seconds(case.plugin, case.calls))
        theirs.append(seconds(case.upstream, case.calls))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "upstream": statistics.median(theirs) * 1e6,
        "plugin": statistics.median(ours) * 1e6,
        "upstream / plugin": statistics.median(ratios),
    }


def seconds(call: Call, calls: int) -> float:
    """Seconds of one call, within a round of calls, as layers follow one another in an engine."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def relative_error(out: Tensor, ref: Tensor) -> float:
    out, ref = out.double().flatten(), ref.double().flatten()
    return ((out - ref).norm() / ref.norm()).item()
