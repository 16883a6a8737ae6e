"""Costs: seconds of a step and of a draft, learned from timings.

    seconds = guess · correction

Guesses are in plain steps. A correction belongs to a cell: so many requests with so many drafts. It
is learned from the cell's timings; a cell without any takes the corrections of its neighbours.

Timings are sometimes several times too long, never too short. So the lower quartile of the last
ones counts, which also follows a machine that gets slower or faster.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log2, sqrt

# Guesses in plain steps; recordings of both engines are within a factor of 2 of them.
TOKEN = 0.2  # extra cost of a step with 1 draft token a request; with n tokens, √n times as much
PASS = 0.2  # a drafting pass; the first costs half as much again
FEW, FAR = 4, 1.5  # the first 4 timings of a cell are capped at 1.5 times its neighbours' cost
WINDOW = 24  # timings that a cell remembers
COLD, SLOWER = 64, 1.1  # the first 64 drafts are capped at 1.1 times the expected cost
REFRESH = 4  # steps between new tables
CATCH_UPS, MANY = 5, 8  # cost of a pending token: minimum of 5 timings with ≥ 8 a request

Guess = Callable[[float], float]  # drafts a request → plain steps
Cell = tuple[float, float]  # log2 requests, drafts a request


def guess_step(drafts: float) -> float:
    return 1 + TOKEN * sqrt(drafts)


def guess_draft(passes: float) -> float:
    return PASS * (passes + 0.5)


class Corrections:
    """What timings say about guessed costs, as factors by cell."""

    def __init__(self, guess: Guess) -> None:
        self.guess = guess
        self.timings: dict[Cell, deque[float]] = {}
        self._factors: dict[Cell, float] = {}

    def observe(self, requests: int, drafts: float, cost: float) -> None:
        cell = round(2 * log2(requests)) / 2, round(2 * drafts) / 2
        timings = self.timings.setdefault(cell, deque(maxlen=WINDOW))
        if len(timings) < FEW and self._factors.keys() - {cell}:
            cost = min(cost, FAR * self.cost(requests, drafts, without=cell))
        timings.append(cost / self.guess(drafts))
        self._factors[cell] = sorted(timings)[len(timings) // 4]

    def cost(self, requests: int, drafts: float, without: Cell | None = None) -> float:
        """The guess, times the factors of cells, weighted by nearness and number of timings."""
        octave, total, weight = log2(requests), 0.0, 0.0
        for cell, factor in self._factors.items():
            if cell == without:
                continue
            distance = (cell[0] - octave) ** 2 + (cell[1] - drafts) ** 2
            nearness = len(self.timings[cell]) / (1 + 10 * distance) ** 2
            total += nearness * factor
            weight += nearness
        return self.guess(drafts) * (total / weight if weight else 1.0)


@dataclass(frozen=True, slots=True)
class Table:
    """Seconds at one batch size; before any step was timed, plain steps."""

    step: list[float]  # with 0, 1, 2, … draft tokens in the batch
    draft: list[float]  # of 0, 1, 2, … drafting passes
    pending: float  # one pending token that the drafter reads first


class Costs:
    """Seconds of steps and drafts of a batch."""

    def __init__(self, step: Guess = guess_step, draft: Guess = guess_draft) -> None:
        self._steps, self._drafts = Corrections(step), Corrections(draft)
        self._cold = COLD  # drafts that may still be cold
        self._catch_ups = deque([0.0], maxlen=CATCH_UPS)  # cost of a pending token, each time
        self._tables: dict[tuple[int, int], Table] = {}
        self.timed = 0  # steps

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""
        self._steps.observe(batch, tokens / batch - 1, seconds)
        self.timed += 1
        if self.timed % REFRESH == 0:
            self._tables.clear()

    def observe_draft(self, requests: int, passes: int, pending: int, seconds: float) -> None:
        """Drafting passes for `requests`, the first over `pending` tokens too, took `seconds`."""
        if not self._steps.timings:
            return
        cost = seconds / self._steps.cost(requests, 0)
        expected = self._drafts.cost(requests, passes)
        if self._cold:
            self._cold -= 1
            cost = min(cost, SLOWER * expected)
        if pending <= requests:
            self._drafts.observe(requests, passes, cost)
        elif pending >= MANY * requests and not self._cold:
            self._catch_ups.append(max(0.0, cost - expected) / pending)

    def table(self, batch: int, num_drafts: int) -> Table:
        """Costs of a batch with up to `num_drafts` tokens each, as of a few steps ago."""
        if (batch, num_drafts) not in self._tables:
            whole = [self._steps.cost(batch, n) for n in range(num_drafts + 1)]
            step = [a + (b - a) * n / batch for a, b in pairwise(whole) for n in range(batch)]
            draft = [whole[0] * self._drafts.cost(batch, n) for n in range(1, num_drafts + 1)]
            pending = whole[0] * min(self._catch_ups)
            self._tables[batch, num_drafts] = Table([*step, whole[-1]], [0.0, *draft], pending)
        return self._tables[batch, num_drafts]
