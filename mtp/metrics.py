"""Metrics: what drafting does and costs, and the longest step, the same in every engine.

The drafter writes to a board with one number per sample. A write is one addition: nothing is sent,
and nothing waits. vLLM serves its metrics from another process, so there the board is a page
of shared memory. In SGLang the scheduler copies the board every few steps.

What is counted does not depend on the engine:

- Steps, seconds and drafts are those of the first tensor-parallel rank.
- A step is timed from the end of the previous drafting to its sampled tokens, including the
  scheduler's work in between. Steps that read a prompt are neither counted nor timed; in SGLang,
  neither is a request's first step after its prompt.
- A row counts in draft_length if it decodes in the step, even if other rows read prompts.
- A state page is held by a request from its first step to its end or preemption. Pages that only
  the prefix cache keeps are free.
"""

import logging
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import median
from typing import Any, Literal

from qwen3next_plugin.mtp.policy import Policy
from qwen3next_plugin.mtp.rows import Row
from qwen3next_plugin.mtp.watch import Watch

PLAIN, VERIFY, DRAFT, CATCH_UP = "plain", "verify", "draft", "catch_up"
ESTIMATES_EVERY = 16  # in steps, not seconds, because this also refreshes the policy's costs
ESTIMATES = {  # metric → key of the policy's snapshot, and the first index that is shown
    "acceptance": ("acceptance", 0),
    "expected_step_seconds": ("step_seconds", 0),
    "expected_draft_seconds": ("draft_seconds", 1),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A number, or one number for each value of a label."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)


def metrics(num_drafts: int) -> tuple[Metric, ...]:
    """All metrics of an engine that drafts up to num_drafts tokens; 0: it does not draft."""
    return (*ALWAYS, *_of_drafts(num_drafts)) if num_drafts else ALWAYS


ALWAYS = (
    Metric("state_pages", "gauge", "State pages that requests hold, in all linear layers"),
    Metric("longest_step_seconds", "gauge", "The longest step of the minute before the last step"),
)


def _of_drafts(num_drafts: int) -> tuple[Metric, ...]:
    from_zero, from_one = (tuple(map(str, range(n, num_drafts + 1))) for n in (0, 1))
    return (
        Metric(
            "draft_length",
            "histogram",
            "Draft tokens of each decoding request in each step",
            "le",
            from_zero,
        ),
        Metric(
            "drafts_verified",
            "counter",
            "Draft tokens verified, those after a rejected one left out",
            "position",
            from_one,
        ),
        Metric("drafts_accepted", "counter", "Draft tokens accepted", "position", from_one),
        Metric(
            "steps",
            "counter",
            "Steps that read no prompt: plain, or with drafts to verify",
            "kind",
            (PLAIN, VERIFY),
        ),
        Metric(
            "seconds",
            "counter",
            "Seconds in such steps (plain, verify), in drafting after steps (draft), in drafting"
            " that first reads tokens that the MTP layer had skipped (catch_up)",
            "kind",
            (PLAIN, VERIFY, DRAFT, CATCH_UP),
        ),
        Metric(
            "drafts_skipped",
            "counter",
            "Times that a decoding request drafted nothing and skipped the MTP layer",
        ),
        Metric("tokens_caught_up", "counter", "Tokens that the MTP layer read after skipping them"),
        Metric(
            "acceptance",
            "gauge",
            "Estimate: chance that a draft token is accepted, given those before it",
            "position",
            from_one,
        ),
        Metric(
            "expected_step_seconds",
            "gauge",
            "Estimate: seconds of a step with so many draft tokens a request, at the current batch",
            "drafts",
            from_zero,
        ),
        Metric(
            "expected_draft_seconds",
            "gauge",
            "Estimate: seconds to draft so many tokens, at the current batch",
            "drafts",
            from_one,
        ),
    )


class Board:
    """The numbers of all metrics. Each metric has one writing process; any process may read."""

    def __init__(self, num_drafts: int, memory: Any = None) -> None:
        self.metrics = {metric.name: metric for metric in metrics(num_drafts)}
        samples = [(m.name, value) for m in self.metrics.values() for value in m.values]
        self.index = {sample: i for i, sample in enumerate(samples)}
        self.numbers = memoryview(memory or bytearray(mmap.PAGESIZE)).cast("d")

    def add(self, name: str, amount: float = 1, value: object = "") -> None:
        """Add to a metric, or to its sample with this value of the label."""
        self.numbers[self.index[name, str(value)]] += amount

    def set(self, name: str, numbers: Sequence[float]) -> None:
        """Set a metric: one number for each value of its label."""
        for value, number in zip(self.metrics[name].values, numbers, strict=True):
            self.numbers[self.index[name, value]] = number

    def read(self, name: str) -> dict[str, float]:
        """The numbers of a metric by value of its label."""
        return {value: self.numbers[self.index[name, value]] for value in self.metrics[name].values}


def create(path: Path, num_drafts: int) -> Board:
    """A board of zeros in a new file that only this user can read.

    Raises: OSError if the file exists, or cannot be written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Takes the memory now. Of a sparse file, a write ends the process if the disk is full.
        os.posix_fallocate(handle, 0, mmap.PAGESIZE)
        return Board(num_drafts, mmap.mmap(handle, mmap.PAGESIZE))
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)


def attach(path: Path, num_drafts: int) -> Board | None:
    """The board in this file, or None if there is no file that this user can open."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return Board(num_drafts, mmap.mmap(handle, mmap.PAGESIZE))
    finally:
        os.close(handle)


class Observer:
    """Reports every step and every draft to the policy and, if there is one, to the board."""

    def __init__(
        self,
        policy: Policy,
        board: Board | None = None,
        report: Callable[[str], None] = logging.getLogger(__name__).error,
    ) -> None:
        self.policy, self.board, self._watch = policy, board, Watch(report)
        self._requests: set[str] = set()  # that the policy may remember
        self._steps_left = 0  # until the estimates are refreshed
        if board is not None:
            for name in ESTIMATES:  # not known yet
                board.set(name, [nan] * len(board.metrics[name].values))

    def observe_step(self, rows: Sequence[Row], seconds: float | None) -> None:
        """A step has ended; `seconds` is None if it was not timed."""
        decoding = [row for row in rows if row.continues]
        tokens = sum(row.scheduled for row in rows)
        if not rows or len(decoding) < len(rows):
            seconds = None  # a prompt was read, so the time is not that of decoding
        for row in decoding:
            self.policy.observe_verify(row.request, row.drafted, row.accepted)
            self._watch.see(row.request, row.drafted, row.accepted)
        if seconds is not None:
            self.policy.observe_step(len(rows), tokens, seconds)
        self._requests.update(row.request for row in rows)
        if self.board is not None:
            self._count_drafts(self.board, Counter((r.drafted, r.accepted) for r in decoding))
            if seconds is not None:
                kind = VERIFY if tokens > len(rows) else PLAIN
                self.board.add("steps", value=kind)
                self.board.add("seconds", seconds, kind)

    def observe_plain(self, requests: Sequence[str], steps: int, seconds: Sequence[float]) -> None:
        """Steps without drafts of these requests have ended; `seconds` of those that were timed."""
        batch = len(requests)
        for request in requests:
            self.policy.observe_verify(request, 0, 0, steps)
        if seconds:
            self.policy.observe_step(batch, batch, median(seconds))
        self._requests.update(requests)
        if self.board is not None:
            self.board.add("draft_length", steps * batch, 0)
            self.board.add("steps", len(seconds), PLAIN)
            self.board.add("seconds", sum(seconds), PLAIN)
            self._refresh_estimates(self.board, steps)

    def observe_skipped(self, times: int) -> None:
        """Decoding requests skipped the MTP layer so many times."""
        if self.board is not None:
            self.board.add("drafts_skipped", times)

    def _count_drafts(self, board: Board, rows: Mapping[tuple[int, int], int]) -> None:
        """Count rows by how many tokens they drafted, and how many of these were accepted."""
        for (drafted, accepted), count in rows.items():
            board.add("draft_length", count, drafted)
            for position in range(1, min(accepted + 1, drafted) + 1):
                board.add("drafts_verified", count, position)
            for position in range(1, accepted + 1):
                board.add("drafts_accepted", count, position)

    def observe_draft(
        self, rows: Sequence[Row], *, passes_seconds: float | None, seconds: float
    ) -> None:
        """Drafting after a step of these rows has ended.

        `passes_seconds` is the time of the drafting passes, None if other work was in between;
        `seconds` is what drafting took in all.
        """
        fed = [row for row in rows if row.fed is not None]
        passes = max((row.draft for row in fed), default=0)
        reads_prompt = not all(row.continues for row in fed)
        if passes and passes_seconds is not None and not reads_prompt:
            self.policy.observe_draft(len(rows), passes, passes_seconds)
        if self.board is not None:
            caught_up = sum(row.caught_up for row in fed)
            self.board.add("seconds", seconds, CATCH_UP if caught_up or reads_prompt else DRAFT)
            self.board.add("drafts_skipped", sum(r.continues and r.fed is None for r in rows))
            self.board.add("tokens_caught_up", caught_up)
            self._refresh_estimates(self.board, 1)

    def keep_only(self, requests: Set[str]) -> None:
        """Make the policy forget all other requests."""
        for request in self._requests - requests:
            self.policy.forget(request)
        self._requests &= requests

    def _refresh_estimates(self, board: Board, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left >= 0:
            return
        self._steps_left = ESTIMATES_EVERY - 1
        known = self.policy.snapshot()
        for name, (key, first) in ESTIMATES.items():
            if key in known:
                board.set(name, known[key][first:])


class LogLine:
    """One line on what has happened since the last line."""

    NAMES = ("draft_length", "steps", "seconds")

    def __init__(self, board: Board) -> None:
        self.board = board
        self.before = {name: board.read(name) for name in self.NAMES}

    def text(self) -> str | None:
        """The line, or None if nothing was decoded."""
        now = {name: self.board.read(name) for name in self.NAMES}
        new = {
            name: {value: number - self.before[name][value] for value, number in numbers.items()}
            for name, numbers in now.items()
        }
        drafts = sum(new["draft_length"].values())
        if not drafts:
            return None
        self.before = now
        return f"MTP: {', '.join(self._parts(new, drafts))}"

    def _parts(self, new: dict[str, dict[str, float]], drafts: float) -> Iterator[str]:
        lengths, seconds = new["draft_length"], new["seconds"]
        mean = sum(int(n) * count for n, count in lengths.items()) / drafts
        shares = ", ".join(f"{n}: {count / drafts:.0%}" for n, count in lengths.items() if count)
        yield f"mean draft length {mean:.2f} ({shares})"
        if total := sum(seconds.values()):
            yield f"{(seconds[DRAFT] + seconds[CATCH_UP]) / total:.0%} of decoding time in drafts"
        if all(new["steps"].values()):
            ratio = seconds[VERIFY] / new["steps"][VERIFY] * new["steps"][PLAIN] / seconds[PLAIN]
            yield f"verify step {ratio:.2f} × plain step"
        yield f"{self.board.read('state_pages')['']:.0f} state pages in use"
