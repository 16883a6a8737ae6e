"""Costs: seconds of a step and of a draft, first from the model's shape, then from timings.

    step  = w1 + w2·tokens + w3·experts(tokens)         experts(n) = E·(1 − (1 − k/E)^n)
    draft = w4·first pass + w5·(passes − 1)·pass        pass = 1 + tokens + experts, as shaped

The weights are fitted to timings. All are positive, so that the sum extrapolates. Near points that
were timed, the fit is bent towards the timings. Each point counts with the median of its last
timings.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2
from typing import Self

from qwen3next_plugin.config import Qwen3NextConfig

DRAFTED = 32768  # most tokens that a draft chooses from: docs/kernels.md says what they cover
FLOP_PER_BYTE = 10.0  # of a CPU; decides what tokens cost until steps are timed
DRIFT = 1.01  # factor on the machine's level for a timing above the median
CHANCE = 4  # longest run of timings on one side of the median that is taken for chance
FAR, SURPRISES = 1.5, 5  # so many timings in a row that are off by FAR are not chance
HORIZON = 500  # a timing is dropped after so many newer ones
WINDOW = 64  # most timings kept of one point
PRIOR = 0.2  # weight of the shape in the fit, in timings
SHAPED = 10.0  # weight of the fit against nearby timings
COLD, SLOWER = 64, 1.2  # the first 64 drafts count as at most 1.2 times slower than expected
REFRESH = 8  # timings between two fits

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a model reads and computes, in any unit: only proportions matter."""

    step: float  # once per step: everything except the experts
    step_expert: float = 0.0  # one expert, in all layers of the trunk
    token: float = 0.0  # each token of the step
    draft: float  # once per drafting pass: the layer and the head
    draft_expert: float = 0.0  # one expert of the drafting layer
    draft_token: float = 0.0  # each request of the pass
    experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Qwen3NextConfig) -> Self:
        """In parameters: those read, and arithmetic as those that could be read meanwhile."""
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
            token=(step + moe * active) / FLOP_PER_BYTE,  # a parameter: 2 bytes, 2 flop
            draft=draft,
            draft_expert=expert,
            draft_token=(draft + active) / FLOP_PER_BYTE,
            experts=c.num_experts,
            experts_per_token=c.num_experts_per_tok,
        )

    def experts_touched(self, tokens: float) -> float:
        """Expected number of distinct experts if each token chose its experts at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)

    def step_terms(self, batch: float, drafts: float) -> tuple[float, ...]:
        """Terms of a step with `drafts` draft tokens per request."""
        tokens = batch * (1 + drafts)
        return self.step, self.token * tokens, self.step_expert * self.experts_touched(tokens)

    def draft_terms(self, batch: float, passes: float) -> tuple[float, ...]:
        """Terms of the first pass, which also reads the committed tokens, and of the others."""
        return self._pass_cost(2 * batch), (passes - 1) * self._pass_cost(batch)

    def _pass_cost(self, tokens: float) -> float:
        experts = self.draft_expert * self.experts_touched(tokens)
        return self.draft + self.draft_token * tokens + experts


class Model:
    """Seconds at (batch, x): a weighted sum of terms, bent towards nearby timings."""

    def __init__(self, terms: Callable[[float, float], tuple[float, ...]]) -> None:
        self.terms = terms
        self.count = 0
        self.weights = [1.0] * len(terms(1, 1))
        self._timings: dict[Point, deque[tuple[int, float]]] = {}
        self._medians: dict[Point, tuple[float, int]] = {}  # seconds, number of timings
        self._bends: list[tuple[Point, float, int]] = []  # seconds/fitted, number of timings
        self._far_off: dict[Point, list[float]] = {}  # timed/usual, in a row

    def at_point(self, batch: int, x: float, seconds: float) -> tuple[Point, float]:
        """The nearest point of a grid (half octaves of batch, halves of x); the seconds there."""
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
        """Timed/usual where the last SURPRISES timings at a well-known point are off by FAR."""
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
        """The median at a well-known point: one with many timings."""
        seconds, timings = self._medians.get(point, (0.0, 0))
        return seconds if timings >= WINDOW // 2 else None

    def fit(self, level: float) -> float:
        """Fit by least squares of relative errors, pulled towards one common weight.

        Returns: that common weight, which is `level` where nothing was timed.
        """
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

    def seconds(self, batch: float, x: float) -> float:
        return self.fitted(batch, x) * self.bend(batch, x)

    def fitted(self, batch: float, x: float) -> float:
        return sum(w * t for w, t in zip(self.weights, self.terms(batch, x), strict=True))

    def bend(self, batch: float, x: float) -> float:
        """Mean timed/fitted of nearby points, weighted by timings and nearness; 1 far away."""
        octave = log2(batch)
        total = weight = SHAPED
        for (o, y), ratio, timings in self._bends:
            nearness = timings / (1 + 10 * ((o - octave) ** 2 + (y - x) ** 2)) ** 2
            total += nearness * ratio
            weight += nearness
        return total / weight


def solve(gram: list[list[float]], goal: list[float], at_least: float) -> list[float]:
    """Solve gram·w = goal, gram positive definite, with every weight `at_least` so large."""
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
    """Solve a positive definite system; the last number of a row is its right side."""
    n = len(rows)
    least = [1e-12 * row[i] for i, row in enumerate(rows)]  # pivot where rounding leaves none
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
    """The lower median: a timing is sometimes several times too long, never too short."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Table:
    """Seconds at one batch size."""

    step: list[float]  # with 0, 1, 2, … draft tokens in the batch
    draft: list[float]  # of 0, 1, 2, … drafting passes
    token: float  # one more draft token in a step that reads all experts anyway
    pending: float  # one pending token that the drafter takes in first

    def among_prompts(self, share: float) -> "Table":
        """The table where this share of steps also reads prompts, and thus all experts anyway.

        The cost of the prompts themselves is left out: drafts do not change it.
        """
        bare, rest = self.step[0], 1 - share
        step = [
            bare + rest * (seconds - bare) + share * self.token * n
            for n, seconds in enumerate(self.step)
        ]
        return replace(self, step=step)


class Costs:
    """Seconds of steps and drafts of a batch, from a shape and from timings."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._steps, self._drafts = Model(shape.step_terms), Model(shape.draft_terms)
        self.level = 1.0  # how slow the machine is now, relative to its timings
        self._run = 0  # timings in a row above the median, below it if negative
        self._pending, self._catch_ups = 0.0, 0  # seconds of a pending token, and how often timed
        self._fitted = -1  # number of timings at the last fit
        self._tables: dict[tuple[int, int], Table] = {}

    @classmethod
    def from_config(cls, config: Qwen3NextConfig) -> Self:
        return cls(Shape.from_config(config))

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""
        self._observe(self._steps, batch, tokens / batch - 1, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` drafting passes took `seconds`."""
        self._observe(self._drafts, batch, passes, seconds)

    def observe_catching_up(self, batch: int, passes: int, tokens: int, seconds: float) -> None:
        """Drafting passes, the first over `tokens` pending tokens too, took `seconds`."""
        usual = self._drafts.seconds(batch, passes)
        extra = max(0.0, seconds / self.level - usual) / tokens
        known, self._catch_ups = self._pending or extra, self._catch_ups + 1
        # The first may be cold: they count for less if they are longer than what is known.
        cold = self._catch_ups < COLD // 4
        weight = (1 / 2 if extra < known else 1 / 8) if cold else 1 / 4
        self._pending = known + (extra - known) * weight

    def _observe(self, model: Model, batch: int, x: float, seconds: float) -> None:
        """Add a timing at the machine's usual speed; well-known points give today's speed."""
        point, seconds = model.at_point(batch, x, seconds / self.level)
        if model is self._steps and (usual := model.usual(point)):
            side = 1 if seconds > usual else -1
            self._run = self._run + side if self._run * side > 0 else side
            change = DRIFT ** (side * max(1, abs(self._run) - CHANCE))
            change = model.surprised(point, seconds) or change
            self.level *= change
            seconds /= change
        elif model is self._drafts and self._steps.count and model.count < COLD:
            seconds = min(seconds, SLOWER * model.seconds(2 ** point[0], point[1]))
        model.observe(point, seconds)

    def table(self, batch: int, max_draft: int) -> Table:
        """Costs of a batch with up to `max_draft` tokens each; at most REFRESH timings old."""
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
                self._pending,
            )
        return self._tables[batch, max_draft]

    def _step_seconds(self, batch: int, max_draft: int) -> Iterator[float]:
        """Seconds of 0, 1, 2, … draft tokens; bends are interpolated between full rounds."""
        bends = [self._steps.bend(batch, x) for x in range(max_draft + 1)]
        for x, (low, high) in enumerate(pairwise([*bends, bends[-1]])):
            for i in range(batch if x < max_draft else 1):
                bend = low + (high - low) * i / batch
                yield self._steps.fitted(batch, x + i / batch) * bend
