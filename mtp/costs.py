"""Costs: seconds of a step and of a draft, first from the model's shape, then from timings.

    seconds = level · shape · correction

The shape gives proportions. A correction belongs to a cell: steps or drafts at one batch size and
number of drafts a request. It is learned from the cell's timings; a cell without timings takes the
corrections of its neighbours. The level is how slow the machine is at present. Timings are divided
by it, so that a slow minute does not make the cells that are timed in it look slow.

Timings are sometimes several times too long, never too short. So what counts is the lower quartile
of the last ones.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import log2
from typing import Self

from qwen3next_plugin.config import Qwen3NextConfig

DRAFTED = 32768  # most tokens that a draft chooses from: docs/kernels.md says what they cover
FLOP_PER_BYTE = 30.0  # of a CPU with AMX; decides what tokens cost until steps are timed
WINDOW = 24  # timings that a cell remembers
RECENT = 17  # timings that give the level; an odd number of a few trials
KNOWN = 8  # timings after which a cell's next ones count for the level
COLD, SLOWER = 64, 1.3  # the first 64 drafts count as at most 1.3 times slower than expected
NEW, FAR = 4, 1.5  # the first 4 timings of a cell count as at most 1.5 times slower than expected
REFRESH = 4  # steps timed before tables are made anew
CATCH_UPS = 5  # what pending tokens cost is the least of so many timings,
FEW = 8  # of at least so many pending tokens a request: fewer cost less than a draft varies

Cell = tuple[float, float]  # log2 of the batch size and drafts a request, both to halves


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

    def step_cost(self, batch: float, drafts: float) -> float:
        """A step with `drafts` draft tokens per request."""
        tokens = batch * (1 + drafts)
        return self.step + self.token * tokens + self.step_expert * self.experts_touched(tokens)

    def draft_cost(self, batch: float, passes: float) -> float:
        """The first pass, which also reads the committed tokens, and the others."""
        return self._pass_cost(2 * batch) + (passes - 1) * self._pass_cost(batch)

    def _pass_cost(self, tokens: float) -> float:
        experts = self.draft_expert * self.experts_touched(tokens)
        return self.draft + self.draft_token * tokens + experts


class Corrections:
    """What timings say about a cost of the shape, as factors by cell."""

    def __init__(self, shape: Callable[[float, float], float]) -> None:
        """`shape`: the cost at (batch, drafts a request), in any unit."""
        self.shape = shape
        self._timings: dict[Cell, deque[float]] = {}
        self._corrections: dict[Cell, float] = {}

    def observe(self, batch: int, x: float, seconds: float, level: float) -> float | None:
        """Learn from a timing. Returns the level that it shows, if the cell is well known."""
        cell = round(2 * log2(batch)) / 2, round(2 * x) / 2
        factor = seconds / self.shape(batch, x)
        timings = self._timings.setdefault(cell, deque(maxlen=WINDOW))
        if len(timings) < NEW and self._corrections:
            factor = min(factor, FAR * level * self.at(batch, x))
        shown = factor / self._corrections[cell] if len(timings) >= KNOWN else None
        timings.append(factor / level)
        self._corrections[cell] = lower_quartile(timings)
        return shown

    def at(self, batch: float, x: float, untimed: float = 1.0) -> float:
        """The mean of cells nearby, weighted by nearness and timings; or `untimed`."""
        octave, total, weight = log2(batch), 0.0, 0.0
        for cell, correction in self._corrections.items():
            distance = (cell[0] - octave) ** 2 + (cell[1] - x) ** 2
            nearness = len(self._timings[cell]) / (1 + 10 * distance) ** 2
            total += nearness * correction
            weight += nearness
        return total / weight if weight else untimed


def lower_quartile(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


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
        self._steps, self._drafts = Corrections(shape.step_cost), Corrections(shape.draft_cost)
        self.level = 0.0  # seconds for each unit of the shape; 0 until a step was timed
        self._levels = deque[float](maxlen=RECENT)
        self._cold = COLD  # drafts that may still be cold
        self._catch_ups = deque[float](maxlen=CATCH_UPS)  # cost of a pending token, each time
        self._tables: dict[tuple[int, int], Table] = {}
        self._age = 0  # of these tables, in steps timed

    @classmethod
    def from_config(cls, config: Qwen3NextConfig) -> Self:
        return cls(Shape.from_config(config))

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""
        self._age += 1
        if self._age == REFRESH:
            self._age = 0
            self._tables.clear()
        drafts = tokens / batch - 1
        self.level = self.level or seconds / self.shape.step_cost(batch, drafts)
        if shown := self._steps.observe(batch, drafts, seconds, self.level):
            self._levels.append(shown)
            self.level = lower_quartile(self._levels)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` drafting passes took `seconds`."""
        if not self.level:
            return
        if self._cold:
            self._cold -= 1
            expected = self.level * self._draft_cost(batch, passes)
            seconds = min(seconds, SLOWER * expected)
        self._drafts.observe(batch, passes, seconds, self.level)

    def observe_catching_up(self, batch: int, passes: int, tokens: int, seconds: float) -> None:
        """Drafting passes, the first over `tokens` pending tokens too, took `seconds`."""
        if self.level and tokens >= FEW * batch:
            extra = seconds / self.level - self._draft_cost(batch, passes)
            self._catch_ups.append(max(0.0, extra) / tokens)

    def table(self, batch: int, max_draft: int) -> Table:
        """Costs of a batch with up to `max_draft` tokens each, as of a few steps ago."""
        if (batch, max_draft) not in self._tables:
            self._tables[batch, max_draft] = self._make_table(batch, max_draft)
        return self._tables[batch, max_draft]

    def _make_table(self, batch: int, max_draft: int) -> Table:
        level = self.level or 1.0
        corrections = [self._steps.at(batch, x) for x in range(max_draft + 1)]
        step = []
        for n in range(batch * max_draft + 1):
            x, rest = divmod(n, batch)
            low, high = corrections[x], corrections[min(x + 1, max_draft)]
            correction = low + (high - low) * rest / batch
            step.append(level * correction * self.shape.step_cost(batch, n / batch))
        draft = [level * self._draft_cost(batch, passes) for passes in range(1, max_draft + 1)]
        return Table(
            step=step,
            draft=[0.0, *draft],
            token=level * corrections[0] * self.shape.token,
            pending=level * self._pending,
        )

    def _draft_cost(self, batch: int, passes: int) -> float:
        """In units of the shape. Until drafts were timed, steps tell how wrong the shape is."""
        untimed = self._steps.at(batch, 0)
        return self.shape.draft_cost(batch, passes) * self._drafts.at(batch, passes, untimed)

    @property
    def _pending(self) -> float:
        """Cost of a pending token; less than timed until it was timed often."""
        timed = len(self._catch_ups)
        return min(self._catch_ups, default=0.0) * timed / CATCH_UPS
