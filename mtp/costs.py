"""Costs: seconds of a step and of a draft, learned from timings.

    seconds = level · guess · correction

The guess is in plain steps. A correction belongs to a cell: steps or drafts of so many requests
with so many drafts each. It is learned from the cell's timings; a cell without timings takes the
corrections of its neighbours. The level is how slow the machine is at present; that of a draft is
what a plain step of as many requests takes. Timings are divided by the level, so that a slow minute
does not make the cells that are timed in it look slow.

Timings are sometimes several times too long, never too short. So what counts is the lower quartile
of the last ones.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import log2, sqrt

# Guesses in plain steps; recordings of both engines are within a factor of 2 of them.
TOKEN = 0.2  # what a step costs more with 1 draft token a request; the root of n as much with n
PASS = 0.2  # a drafting pass; the first costs half as much again
FEW, FAR = 4, 1.5  # the first 4 timings of a cell count as at most 1.5 times as slow as expected
WINDOW = 24  # timings that a cell remembers
RECENT = 17  # timings that give the level; an odd number of a few trials
COLD, SLOWER = 64, 1.1  # the first 64 drafts count as at most 1.1 times slower than expected
REFRESH = 4  # steps timed before tables are made anew
CATCH_UPS = 5  # what pending tokens cost is the least of so many timings,
MANY = 8  # of at least so many pending tokens a request: fewer cost less than a draft varies

Cell = tuple[float, float]  # log2 of the requests and drafts a request, both to halves


def lower_quartile(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


def guess_step(drafts: float) -> float:
    """A step with so many drafts a request."""
    return 1 + TOKEN * sqrt(drafts)


def guess_draft(passes: float) -> float:
    """So many drafting passes."""
    return PASS * (passes + 0.5)


class Corrections:
    """What timings say about guessed costs, as factors by cell."""

    def __init__(self, guess: Callable[[float], float]) -> None:
        self.guess = guess
        self._timings: dict[Cell, deque[float]] = {}
        self._corrections: dict[Cell, float] = {}

    def observe(self, requests: int, drafts: float, seconds: float, level: float) -> float | None:
        """Learn from a timing. Returns the level that it shows, unless it is the cell's first."""
        cell = round(2 * log2(requests)) / 2, round(2 * drafts) / 2
        factor = seconds / self.guess(drafts)
        timings = self._timings.setdefault(cell, deque(maxlen=WINDOW))
        if len(timings) < FEW and self._corrections:
            factor = min(factor, FAR * level * self.cost(requests, drafts) / self.guess(drafts))
        shown = factor / self._corrections[cell] if timings else None
        timings.append(factor / level)
        self._corrections[cell] = lower_quartile(timings)
        return shown

    def cost(self, requests: int, drafts: float) -> float:
        """In plain steps: the guess, times the corrections of cells by nearness and timings."""
        octave, total, weight = log2(requests), 0.0, 0.0
        for cell, correction in self._corrections.items():
            distance = (cell[0] - octave) ** 2 + (cell[1] - drafts) ** 2
            nearness = len(self._timings[cell]) / (1 + 10 * distance) ** 2
            total += nearness * correction
            weight += nearness
        return self.guess(drafts) * (total / weight if weight else 1.0)


@dataclass(frozen=True, slots=True)
class Table:
    """Seconds at one batch size."""

    step: list[float]  # with 0, 1, 2, … draft tokens in the batch
    draft: list[float]  # of 0, 1, 2, … drafting passes
    pending: float  # one pending token that the drafter takes in first


class Costs:
    """Seconds of steps and drafts of a batch."""

    def __init__(
        self,
        step: Callable[[float], float] = guess_step,
        draft: Callable[[float], float] = guess_draft,
    ) -> None:
        """Guesses in plain steps: of a step by drafts a request, of a draft by passes."""
        self._steps, self._drafts = Corrections(step), Corrections(draft)
        self.level = 0.0  # seconds of a plain step; 0 until a step was timed
        self._levels = deque[float](maxlen=RECENT)
        self._cold = COLD  # drafts that may still be cold
        self._catch_ups = deque([0.0], maxlen=CATCH_UPS)  # cost of a pending token, each time
        self._tables: dict[tuple[int, int], Table] = {}
        self._age = 0  # of these tables, in steps timed

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""
        self._age += 1
        if self._age == REFRESH:
            self._age = 0
            self._tables.clear()
        drafts = tokens / batch - 1
        self.level = self.level or seconds / self._steps.guess(drafts)
        if shown := self._steps.observe(batch, drafts, seconds, self.level):
            self._levels.append(shown)
            self.level = lower_quartile(self._levels)

    def observe_draft(self, requests: int, passes: int, pending: int, seconds: float) -> None:
        """Drafting passes for `requests`, the first over `pending` tokens too, took `seconds`."""
        if not self.level:
            return
        plain = self.level * self._steps.cost(requests, 0)
        if self._cold:
            self._cold -= 1
            seconds = min(seconds, SLOWER * plain * self._drafts.cost(requests, passes))
        if pending <= requests:
            self._drafts.observe(requests, passes, seconds, plain)
        elif pending >= MANY * requests and not self._cold:
            extra = seconds / plain - self._drafts.cost(requests, passes)
            self._catch_ups.append(max(0.0, extra) / pending)

    def table(self, batch: int, max_draft: int) -> Table:
        """Costs of a batch with up to `max_draft` tokens each, as of a few steps ago."""
        if (batch, max_draft) not in self._tables:
            self._tables[batch, max_draft] = self._make_table(batch, max_draft)
        return self._tables[batch, max_draft]

    def _make_table(self, batch: int, max_draft: int) -> Table:
        level = self.level or 1.0
        whole = [level * self._steps.cost(batch, n) for n in range(max_draft + 1)]
        step = [
            low + (high - low) * n / batch for low, high in pairwise(whole) for n in range(batch)
        ]
        draft = [whole[0] * self._drafts.cost(batch, n) for n in range(1, max_draft + 1)]
        return Table([*step, whole[-1]], [0.0, *draft], whole[0] * min(self._catch_ups))
