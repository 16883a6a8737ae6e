"""A case: two ways to compute the same, checked against each other, then timed in turn."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.report import Record, RedCheckError, Run, console
from qwen3next_plugin.kernels import native
from qwen3next_plugin.machine.huge_pages import use_huge_pages

TOLERANCE = 2e-2  # of upstream and plugin against each other, both bf16
PAIRS = 16

Call = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """The two ways to run it, and how many calls visit all pages once."""

    name: str
    plugin: Call
    upstream: Call
    calls: int = 1


def record(run: Run, name: str, question: str, cases: Callable[[], Iterator[Case]]) -> Record:
    """Every case of an op; raises RedCheckError on the first red check."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    use_huge_pages()  # for both sides, as the plugin's servers do
    torch.manual_seed(0)
    rows = {case.name: timed(case) for case in track(cases(), f"kernels: {name}", console=console)}
    return run.record(
        f"kernels/{name}",
        question,
        f"released model's shapes, bf16, {native.isa()}",
        {"upstream": "µs", "plugin": "µs", "upstream / plugin": ""},
        rows,
    )


def timed(case: Case) -> dict[str, float]:
    """Check while warming up, then time pairs; the ratio is the median of the pairs' ratios."""
    for _ in range(2 * case.calls):  # so that every page has a past
        error = relative_error(case.plugin(), case.upstream())
        if not error <= TOLERANCE:
            raise RedCheckError(f"{case.name}: plugin and upstream differ by {error:.1e}")
    ours, theirs = [], []
    for _ in range(PAIRS):
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
