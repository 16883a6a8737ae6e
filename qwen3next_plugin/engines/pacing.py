"""Pacing: how many tokens of which prompts a step reads while others wait for their next token.

On a CPU a step takes as long as the prompts in it, and nobody gets a token before it ends. While
someone waits, a step has a budget of seconds (QWEN3NEXT_STEP_SECONDS). Someone waits if a request
decodes, or if one of several prompts is short. A prompt alone is read in the engine's own chunks.

Step times are learned from the last steps. Timings are sometimes too long, never too short, so the
median of steps of similar size counts. Beyond the largest step, time grows with the tokens.

Where prompts do not fit one step, the oldest and the shortest are read in turns. So the oldest gets
every second step at least, and a short prompt waits for one step of a long one.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

FIRST = 64  # tokens of prompts in a step before any was timed
UNIT = 8  # tokens: a cell of linear attention; a chunk is one or more whole cells
AIM = 0.85  # of the budget: target of a step's predicted time; some steps take longer
LEAST_SHARE = 0.25  # of the budget that prompts get, however long decoding takes
SHORT = 4  # a short prompt fits in at most so many steps of the budget
RECENT, ALIKE = 64, 9  # remembered steps with prompts; steps without, for each number of rows
ATTENTION = 4096  # tokens of context for which attention takes at most as long as all else
MINUTE = 60.0
TIMEOUT = 3600  # seconds after which an engine may consider a step hung


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is being read, or waits for that."""

    rest: int  # tokens that are still to be read
    context: int  # tokens before them


@dataclass(frozen=True, slots=True)
class Timing:
    """A step that read prompts."""

    tokens: int
    context: float  # mean position of the tokens
    seconds: float  # that the prompts took


def typical(seconds: Sequence[float]) -> float:
    """The median; of two, the shorter."""
    return sorted(seconds)[(len(seconds) - 1) // 2]


def octave(context: float) -> int:
    return round(log2(1 + context / ATTENTION))


class Costs:
    """Seconds of steps, learned from timings."""

    def __init__(self) -> None:
        self.prompts: deque[Timing] = deque(maxlen=RECENT)
        self.decoding: dict[int, deque[float]] = {}  # by log2 of the rows

    def observe(self, rows: int, tokens: int, context: float, seconds: float) -> None:
        """A step decoded `rows` rows and read so many tokens of prompts, at this mean position."""
        if tokens:
            alone = max(seconds - self.decode(rows), LEAST_SHARE * seconds)
            self.prompts.append(Timing(tokens, context, alone))
        elif rows:
            cell = self.decoding.setdefault(round(log2(rows)), deque(maxlen=ALIKE))
            cell.append(seconds)

    def decode(self, rows: int) -> float:
        """Seconds to decode so many rows, from the nearest number of rows that was timed."""
        if not rows or not self.decoding:
            return 0.0
        return typical(self.decoding[min(self.decoding, key=lambda n: abs(n - log2(rows)))])

    def fit(self, seconds: float, context: float) -> int:
        """Tokens at this context that take at most so many seconds, by what is known."""
        points = self._points(context)
        if not points:
            return FIRST
        for (fewer, less), (more, longer) in pairwise([(0.0, 0.0), *points]):
            if longer > seconds:
                return int(fewer + (more - fewer) * (seconds - less) / (longer - less))
        tokens, longest = points[-1]
        return int(tokens * seconds / longest)

    def _points(self, context: float) -> list[tuple[float, float]]:
        """Tokens and seconds of steps at the nearest contexts, in the order of tokens.

        More tokens never take less time, nor more than proportionally more. Older steps that
        contradict newer ones are corrected: the machine was cold then, or has changed.
        """
        points: list[tuple[float, float]] = []  # the newest first
        for cell in self._cells(context):
            tokens = sum(one.tokens for one in cell) / len(cell)
            seconds = typical([one.seconds * _longer(one.context, context) for one in cell[:ALIKE]])
            for others, took in points:
                lowest, highest = sorted((took, took * tokens / others))
                seconds = min(max(seconds, lowest), highest)
            points.append((tokens, seconds))
        return sorted(points)

    def _cells(self, context: float) -> list[list[Timing]]:
        """Steps at the nearest contexts, grouped by similar size; both in order, newest first."""
        at = octave(context)
        nearest = min((abs(octave(one.context) - at) for one in self.prompts), default=0)
        cells: dict[int, list[Timing]] = {}
        for one in reversed(self.prompts):
            if abs(octave(one.context) - at) == nearest:
                cells.setdefault(round(2 * log2(one.tokens)), []).append(one)
        return list(cells.values())


def _longer(known: float, context: float) -> float:
    """Upper bound on how many times as long a step takes at a longer context."""
    return max(1.0, (ATTENTION + context) / (ATTENTION + known))


class Pacing:
    """Divides a step among prompts; one per scheduler.

    `agree` replaces a number by the first tensor-parallel rank's, if each rank has a scheduler.
    """

    def __init__(self, seconds: float, agree: Callable[[int], int] = int) -> None:
        self.seconds, self.agree = seconds, agree
        self.costs = Costs()
        self.oldest_had_its_turn = False
        self.limit = self.first = 0  # of the last step that was divided

    def shares(self, prompts: Sequence[Prompt], rows: int, most: int) -> list[int] | None:
        """Tokens of each prompt for this step, in which `rows` rows decode; None: engine's choice.

        `prompts` are in the order of their arrival; `most` is the engine's own chunk. `limit` and
        `first` say how many tokens the step has for prompts, and who comes first.
        """
        if not self.seconds or not prompts:
            return None
        first = self._whose_turn(prompts)
        fit = self._fit(rows, prompts[first].context, most)
        shortest = min(prompt.rest for prompt in prompts)
        waits = rows > 0 or (len(prompts) > 1 and shortest <= SHORT * fit)
        left = self.limit = fit if waits else most
        all_fit = sum(prompt.rest for prompt in prompts) <= left
        if not waits and (all_fit or len(prompts) == 1):
            return None
        if all_fit:
            first = 0
        else:
            self.oldest_had_its_turn = first == 0
        self.first, shares = first, [0] * len(prompts)
        for i in (first, *(i for i in range(len(prompts)) if i != first)):
            shares[i] = min(prompts[i].rest, left)
            left -= shares[i]
        return shares

    def _whose_turn(self, prompts: Sequence[Prompt]) -> int:
        if not self.oldest_had_its_turn:
            return 0
        return min(range(len(prompts)), key=lambda i: prompts[i].rest)

    def _fit(self, rows: int, context: int, most: int) -> int:
        """Tokens of prompts that fit the budget beside so many decoding rows."""
        least = LEAST_SHARE * self.seconds
        left = max(AIM * self.seconds - self.costs.decode(rows), least)
        fit = self.agree(min(most, self.costs.fit(left, context)))
        return min(most, max(UNIT, fit // UNIT * UNIT))


class LongestStep:
    """The longest step of the last minute."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, float]] = deque()  # (end, seconds), ever shorter ones

    def observe(self, now: float, seconds: float) -> float:
        """Record a step; returns the longest step's seconds."""
        while self.steps and self.steps[-1][1] <= seconds:
            self.steps.pop()
        self.steps.append((now, seconds))
        while self.steps[0][0] < now - MINUTE:
            self.steps.popleft()
        return self.steps[0][1]
