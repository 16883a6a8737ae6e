"""Replay policies on recorded timings and acceptance: see --help.

The clock is a position in the recording. A policy observes the next timing of a cell after the
clock, so noise and slow phases come when they came, in all cells at once. The recorder went through
all cells; a policy that stays in one moves through the recording as many times faster. What counts
is the cell's median: one timing of 20 steps' length must not decide which policy is better.
"""

import itertools
import json
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import typer

from qwen3next_plugin.mtp.costs import Costs
from qwen3next_plugin.mtp.policy import Adaptive, Fixed, Policy

RECORDED = Path(__file__).parent / "recorded"
AGAIN = 0.1  # share of a recording, its cold start, that is left out when it starts again
EARLY = 100  # steps
COLD = 40  # first timings of drafts that a colder start makes COLDER times too long
COLDER = 3.0
PROMPT = 100  # tokens of each prompt, all pending when a request starts
TOKENS = 1500  # of each request of a batch that is served, about
ELSEWHERE = 7  # steps by which requests begin elsewhere in their runs, one after the other
STARTS = 6  # replays of a recording, each from another request and another position

Cell = tuple[float, float]  # drafting passes (0: a step), draft tokens per request in halves
Timings = Mapping[Cell, list[tuple[int, float]]]  # (position, seconds)


@dataclass(frozen=True)
class Recording:
    """What record.py wrote."""

    engine: str
    model: str
    batch: int
    num_drafts: int
    runs: list[str]  # of each request, how many drafts were right in each step, as digits
    pending: float  # seconds of a pending token
    timings: Timings
    length: int

    @property
    def stride(self) -> int:
        """Steps of the recording for each step in one cell."""
        return sum(passes == 0 for passes, _ in self.timings)

    def after(self, clock: float, passes: int, drafts: float) -> tuple[float, float]:
        """The next timing of a cell, and the cell's median; between two cells, of both."""
        cells = sorted(cell for cell in self.timings if cell[0] == passes)
        low = max((cell for cell in cells if cell[1] <= drafts), default=cells[0])
        high = min((cell for cell in cells if cell[1] >= drafts), default=cells[-1])
        share = (drafts - low[1]) / (high[1] - low[1]) if low < high else 0.0
        timings = [self._next(clock, cell) for cell in (low, high)]
        medians = [self.medians[cell] for cell in (low, high)]
        timing, median = (a + share * (b - a) for a, b in (timings, medians))
        return timing, median

    def _next(self, clock: float, cell: Cell) -> float:
        timings = self.timings[cell]
        return timings[min(bisect_right(timings, (clock, 1e9)), len(timings) - 1)][1]

    @cached_property
    def medians(self) -> dict[Cell, float]:
        return {
            cell: statistics.median(seconds for _, seconds in timings)
            for cell, timings in self.timings.items()
        }


def load(path: Path) -> Recording:
    found = json.loads(path.read_text())
    batch, timings = found["batch"], defaultdict[Cell, list[tuple[int, float]]](list)
    steps = ((at, 0, tokens - batch, us) for at, tokens, us in found["steps"])
    for at, passes, drafts, us in itertools.chain(steps, found["drafts"]):
        timings[passes, round(2 * drafts / batch) / 2].append((at, us / 1e6))
    return Recording(
        found["engine"],
        found["model"],
        batch,
        found["num_drafts"],
        found["runs"],
        found["pending"] / 1e6,
        dict(timings),
        found["steps"][-1][0],
    )


@dataclass(slots=True)
class Request:
    """A request that produces as many tokens as the recorded one."""

    name: str
    run: str
    tokens: int  # still to produce
    pending: int = PROMPT  # tokens of earlier steps that the MTP layer has not read
    committed: int = 0  # tokens of the step that just ended
    steps: int = 0
    drafted: int = 0


@dataclass
class Result:
    """Tokens and seconds up to each step."""

    marks: list[tuple[int, float]] = field(default_factory=list)


class Replay:
    """Serves as many requests at a time as were recorded, one after the other."""

    def __init__(self, recording: Recording, policy: Policy, cold: int = 0, start: int = 0) -> None:
        """`start` of STARTS: where in the recording it begins; 0 is where the engine started."""
        self.recording, self.policy, self.cold = recording, policy, cold
        self.runs, self.names = itertools.cycle(recording.runs), itertools.count()
        for _ in range(start * len(recording.runs) // STARTS):
            next(self.runs)
        self.active = [self.request() for _ in range(recording.batch)]
        self.clock, self.tokens, self.seconds = start / STARTS * recording.length, 0, 0.0

    def request(self) -> Request:
        """Begins anywhere in a run: else only the longest drafts would end it exactly."""
        number, run = next(self.names), next(self.runs)
        tokens = sum(int(digit) + 1 for digit in run)
        return Request(f"r{number}", run, tokens, steps=number * ELSEWHERE % len(run))

    def run(self) -> Result:
        result = Result()
        while self.tokens < TOKENS * self.recording.batch:
            self.step()
            self.draft()
            result.marks.append((self.tokens, self.seconds))
        return result

    def step(self) -> None:
        """Verify, and begin another request where one ends; no prompt takes time."""
        self.clock += self.recording.stride
        if self.clock >= self.recording.length:
            self.clock = AGAIN * self.recording.length
        B, drafts = len(self.active), sum(r.drafted for r in self.active)
        timing, seconds = self.recording.after(self.clock, 0, drafts / B)
        for i, r in enumerate(self.active):
            accepted = min(r.drafted, int(r.run[r.steps % len(r.run)]))
            self.policy.observe_verify(r.name, r.drafted, accepted)
            tokens = min(r.tokens, 1 + accepted)
            r.tokens, r.steps, r.committed = r.tokens - tokens, r.steps + 1, tokens
            self.tokens += tokens
            if not r.tokens:
                self.policy.forget(r.name)
                self.active[i] = self.request()
        self.policy.observe_step(B, B + drafts, timing)
        self.seconds += seconds

    def draft(self) -> None:
        requests = [r.name for r in self.active]
        lengths = self.policy.lengths(requests, [r.pending for r in self.active])
        B, fed = len(lengths), 0
        for r, length in zip(self.active, lengths, strict=True):
            r.drafted, r.pending = length, r.pending + r.committed
            if length:
                fed, r.pending = fed + r.pending, 0
        if not any(lengths):
            return
        timing, seconds = self.recording.after(self.clock, max(lengths), sum(lengths) / B)
        catch_up = self.recording.pending * max(0, fed - 2 * B)
        self.seconds += seconds + catch_up
        timing += catch_up
        if self.cold:
            self.cold, timing = self.cold - 1, timing * COLDER
        self.policy.observe_draft(B, max(lengths), timing)


def adaptive(recording: Recording) -> Adaptive:
    return Adaptive(recording.num_drafts, Costs())


def rates(recording: Recording, make: Callable[[], Policy], cold: int) -> tuple[float, float]:
    """Tokens per second over all starts: of all steps, and of the first."""
    results = [Replay(recording, make(), cold, start).run() for start in range(STARTS)]
    return together(r.marks[-1] for r in results), together(r.marks[:EARLY][-1] for r in results)


def together(marks: Iterable[tuple[int, float]]) -> float:
    """Tokens per second."""
    tokens, seconds = zip(*marks, strict=True)
    return sum(tokens) / sum(seconds)


def shares(
    recording: Recording, make: Callable[[Recording], Policy], cold: int = 0
) -> tuple[float, float]:
    """Tokens per second, relative to the best fixed length: of all steps, and of the first."""
    lengths = range(recording.num_drafts + 1)
    fixed = [rates(recording, lambda n=n: Fixed(n), cold) for n in lengths]
    found = rates(recording, lambda: make(recording), cold)
    return found[0] / max(all_ for all_, _ in fixed), found[1] / max(early for _, early in fixed)


COLUMNS = ("all", "first 100", "cold, all", "cold, first 100")


def main() -> None:
    """Replay the adaptive policy on each recording, and print what it reaches.

    All figures are relative to the best fixed draft length in hindsight, of all steps and of the
    first 100; cold: the first 40 drafts take three times as long.
    """
    print(", ".join(("recording", *COLUMNS)))
    for path in sorted(RECORDED.glob("*.json")):
        recording = load(path)
        warm, cold = (shares(recording, adaptive, n) for n in (0, COLD))
        print(", ".join((path.stem, *(f"{share:.3f}" for share in (*warm, *cold)))))


if __name__ == "__main__":
    typer.run(main)
