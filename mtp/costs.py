"""Costs: what a step and a draft take, from a model's shape at first and from timings ever after.

    step  = w1 + w2·tokens + w3·experts(tokens)         experts(n) = E·(1 − (1 − k/E)^n)
    draft = w4·first pass + w5·(passes − 1)·pass        pass = 1 + tokens + experts, as shaped

The weights are fitted to timings, all positive, so that the sum extrapolates; close to points that
were timed it is bent towards them. Of the last timings at one point the median counts.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2
from typing import Self

from qwen3next_plugin.config import Qwen3NextConfig

DRAFTED = 32768  # tokens that a draft chooses from, at most: docs/kernels.md has what they cover
DRIFT = 1.01  # of the machine's level, by each timing above the median
CHANCE = 4  # timings in a row on one side of the median; a longer run is a change of the machine
FAR, SURPRISES = 1.5, 5  # another size, and how often in a row it is no chance
HORIZON = 500  # timings after which one is out of date
WINDOW = 64  # timings kept of one point
PRIOR = 0.05  # weight of the shape in the fit, in timings
SHAPED = 10.0  # weight of the fit against timings nearby
REFRESH = 8  # timings between two fits

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is read and computed, in any one unit: only proportions matter."""

    step: float  # once a step: everything but the experts
    step_expert: float = 0.0  # one expert, in all layers of the trunk
    token: float = 0.0  # more for each token of the step
    draft: float  # once a drafting pass: the layer and the head
    draft_expert: float = 0.0  # one expert of the drafting layer
    draft_token: float = 0.0  # more for each request of the pass
    experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Qwen3NextConfig, flop_per_byte: float = 20.0) -> Self:
        """Weights read, and arithmetic as the bytes a machine reads meanwhile (GPU: 200, CPU: 10).

        One unit is one parameter.
        """
        c, D = config, config.hidden_size
        linear = D * (c.in_proj_qkvz_size + c.in_proj_ba_size + c.value_dim)
        attention = D * (c.q_proj_size + 2 * c.kv_proj_size + c.attention_dim)
        expert = 3 * D * c.moe_intermediate_size
        sparse = D * c.num_experts + 3 * D * c.shared_expert_intermediate_size
        head = D * c.vocab_size
        moe = c.num_moe_layers
        drafted_head = D * min(c.vocab_size, DRAFTED) / 2  # int8
        step = linear * c.num_linear_layers + attention * c.num_attention_layers + head
        step += moe * sparse + (c.num_hidden_layers - moe) * 3 * D * c.intermediate_size
        draft = 2 * D * D + attention + drafted_head
        draft += sparse if c.num_experts else 3 * D * c.intermediate_size
        active = c.num_experts_per_tok * expert
        return cls(
            step=step,
            step_expert=moe * expert,
            token=(step + moe * active) / flop_per_byte,  # a parameter: 2 bytes, 2 flop
            draft=draft,
            draft_expert=expert,
            draft_token=(draft + active) / flop_per_byte,
            experts=c.num_experts,
            experts_per_token=c.num_experts_per_tok,
        )

    def experts_touched(self, tokens: float) -> float:
        """Distinct experts that `tokens` tokens are routed to, each choosing at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)

    def step_terms(self, batch: float, drafts: float) -> tuple[float, ...]:
        """Parts of a step with `drafts` draft tokens a request."""
        tokens = batch * (1 + drafts)
        return self.step, self.token * tokens, self.step_expert * self.experts_touched(tokens)

    def draft_terms(self, batch: float, passes: float) -> tuple[float, ...]:
        """First pass, which also takes in what the step committed, and further passes."""
        return self._pass_cost(2 * batch), (passes - 1) * self._pass_cost(batch)

    def _pass_cost(self, tokens: float) -> float:
        experts = self.draft_expert * self.experts_touched(tokens)
        return self.draft + self.draft_token * tokens + experts


class Model:
    """Seconds at (batch, x): a weighted sum of terms, bent towards timings nearby."""

    def __init__(self, terms: Callable[[float, float], tuple[float, ...]]) -> None:
        self.terms = terms
        self.count = 0
        self.weights = [1.0] * len(terms(1, 1))
        self._timings: dict[Point, deque[tuple[int, float]]] = {}
        self._medians: dict[Point, tuple[float, int]] = {}  # seconds, number of timings
        self._bends: list[tuple[Point, float, int]] = []  # seconds/fit, number of timings
        self._far_off: dict[Point, list[float]] = {}  # timed/usual, of timings in a row

    def at_point(self, batch: int, x: float, seconds: float) -> tuple[Point, float]:
        """The nearest point, half octaves of batch and halves of x apart, and the seconds there."""
        point = octave, x_ = round(2 * log2(batch)) / 2, round(2 * x) / 2
        return point, seconds * self.fitted(2**octave, x_) / self.fitted(batch, x)

    def observe(self, point: Point, seconds: float) -> None:
        self.count += 1
        timings = self._timings.setdefault(point, deque(maxlen=WINDOW))
        timings.append((self.count, seconds))
        while timings[0][0] <= self.count - HORIZON:
            timings.popleft()
        self._medians[point] = median(s for _, s in timings), len(timings)

    def surprised(self, point: Point, seconds: float) -> float | None:
        """Timed/usual where timings at a well-known point are of another size, not by chance."""
        usual = self.usual(point)
        if usual is None or 1 / FAR <= seconds / usual <= FAR:
            self._far_off.pop(point, None)
            return None
        ratios = self._far_off.setdefault(point, [])
        ratios.append(seconds / usual)
        if len(ratios) < SURPRISES:
            return None
        return median(self._far_off.pop(point))

    def usual(self, point: Point) -> float | None:
        """Seconds at a point that is well known."""
        seconds, timings = self._medians.get(point, (0.0, 0))
        return seconds if timings >= WINDOW // 2 else None

    def fit(self, level: float) -> float:
        """Least squares of relative errors, drawn towards one weight for all; returns that one."""
        points = [
            (self.terms(2**octave, x), seconds, n)
            for (octave, x), (seconds, n) in self._medians.items()
        ]
        if points:
            timings = sum(n for _, _, n in points)
            level = sum(n * s / sum(terms) for terms, s, n in points) / timings
        size = range(len(self.weights))
        gram = [[sum(n * t[f] * t[g] / (s * s) for t, s, n in points) for g in size] for f in size]
        goal = [sum(n * t[f] / s for t, s, n in points) for f in size]
        for f in size:
            gram[f][f] += PRIOR / level**2
            goal[f] += PRIOR / level
        self.weights = solve(gram, goal, at_least=level / 1000)
        self._bends = [
            (point, seconds / self.fitted(2 ** point[0], point[1]), n)
            for point, (seconds, n) in self._medians.items()
        ]
        return level

    def seconds(self, batch: int, x: float) -> float:
        return self.fitted(batch, x) * self.bend(batch, x)

    def fitted(self, batch: float, x: float) -> float:
        return sum(w * t for w, t in zip(self.weights, self.terms(batch, x), strict=True))

    def bend(self, batch: int, x: float) -> float:
        """Timed/fitted at the points around, by number of timings and nearness; 1 far away."""
        octave = log2(batch)
        total = weight = SHAPED
        for (o, y), ratio, timings in self._bends:
            nearness = timings / (1 + 10 * ((o - octave) ** 2 + (y - x) ** 2)) ** 2
            total += nearness * ratio
            weight += nearness
        return total / weight


def solve(gram: list[list[float]], goal: list[float], at_least: float) -> list[float]:
    """Of gram·w = goal, gram positive definite; weights that would be too small are at_least."""
    free, w = list(range(len(goal))), [at_least] * len(goal)
    while free:
        rest = [g for g in range(len(w)) if g not in free]
        rows = [
            [*(gram[f][g] for g in free), goal[f] - sum(gram[f][g] * w[g] for g in rest)]
            for f in free
        ]
        found = eliminated(rows)
        if min(found) >= at_least:
            for f, weight in zip(free, found, strict=True):
                w[f] = weight
            break
        free.pop(found.index(min(found)))
    return w


def eliminated(rows: list[list[float]]) -> list[float]:
    """Solution of a positive definite system, its right side last in each row."""
    n = len(rows)
    least = [1e-12 * row[i] for i, row in enumerate(rows)]  # where rounding leaves a pivot nothing
    for i in range(n):
        rows[i][i] = max(rows[i][i], least[i])
        for j in range(i + 1, n):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [b - factor * a for a, b in zip(rows[i], rows[j], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(rows[i][j] * found[j] for j in range(i + 1, n))
        found[i] = (rows[i][n] - rest) / rows[i][i]
    return found


def median(values: Iterable[float]) -> float:
    """The lower one of two: a timing is sometimes several times too long, never too short."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Table:
    """Seconds at one batch size."""

    step: list[float]  # with 0, 1, 2, … draft tokens in the batch
    draft: list[float]  # of 0, 1, 2, … drafting passes
    token: float  # a draft token more in a step whose experts are all read anyway
    behind: float  # a token that the drafter has to catch up with

    def among_prompts(self, share: float) -> "Table":
        """With that share of steps also reading prompts, which touch the experts of drafts too.

        What prompts themselves take is the same for each token, however it was drafted: left out.
        """
        bare, rest = self.step[0], 1 - share
        step = [
            bare + rest * (seconds - bare) + share * self.token * n
            for n, seconds in enumerate(self.step)
        ]
        return replace(self, step=step)


class Costs:
    """Seconds of steps and drafts for a batch, from a shape and from timings."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._steps, self._drafts = Model(shape.step_terms), Model(shape.draft_terms)
        self.level = 1.0  # how slow the machine is now
        self._run = 0  # timings in a row above the median, below it if negative
        self._behind = 0.0  # seconds of a token that the drafter catches up with
        self._fitted = -1  # timings at the last fit
        self._tables: dict[tuple[int, int], Table] = {}

    @classmethod
    def from_config(cls, config: Qwen3NextConfig, flop_per_byte: float = 20.0) -> Self:
        return cls(Shape.from_config(config, flop_per_byte))

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """Time of a step of `batch` requests, none of them in prefill, with `tokens` tokens."""
        self._observe(self._steps, batch, tokens / batch - 1, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """Time of all `passes` drafting passes after a step of `batch` requests."""
        self._observe(self._drafts, batch, passes, seconds)

    def observe_catching_up(self, batch: int, passes: int, tokens: int, seconds: float) -> None:
        """Time of drafting passes, the first of which also took in `tokens` from steps before."""
        usual = self._drafts.seconds(batch, passes)
        extra = max(0.0, seconds / self.level - usual) / tokens
        self._behind = (self._behind + extra) / 2 if self._behind else extra

    def _observe(self, model: Model, batch: int, x: float, seconds: float) -> None:
        """Well-known points tell how fast the machine is now; the rest is told at that speed."""
        point, seconds = model.at_point(batch, x, seconds / self.level)
        if model is self._steps and (usual := model.usual(point)):
            side = 1 if seconds > usual else -1
            self._run = self._run + side if self._run * side > 0 else side
            change = DRIFT ** (side * max(1, abs(self._run) - CHANCE))
            change = model.surprised(point, seconds) or change
            self.level *= change
            seconds /= change
        model.observe(point, seconds)

    def table(self, batch: int, max_draft: int) -> Table:
        """What a batch costs with up to `max_draft` tokens each; a few timings old at most."""
        timings = self._steps.count + self._drafts.count
        if self._fitted < 0 or timings - self._fitted >= min(REFRESH, 1 + self._fitted // 4):
            self._fitted = timings
            self._drafts.fit(self._steps.fit(1.0))
            self._tables.clear()
        if (batch, max_draft) not in self._tables:
            self._tables[batch, max_draft] = Table(
                list(self._step_seconds(batch, max_draft)),
                [0.0, *(self._drafts.seconds(batch, x) for x in range(1, max_draft + 1))],
                self._steps.weights[1] * self.shape.token,
                self._behind,
            )
        return self._tables[batch, max_draft]

    def _step_seconds(self, batch: int, max_draft: int) -> Iterator[float]:
        """Bent as at 0, 1, 2, … drafts a request, and straight in between."""
        bends = [self._steps.bend(batch, x) for x in range(max_draft + 1)]
        for x, (low, high) in enumerate(pairwise([*bends, bends[-1]])):
            for i in range(batch if x < max_draft else 1):
                bend = low + (high - low) * i / batch
                yield self._steps.fitted(batch, x + i / batch) * bend
