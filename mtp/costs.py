"""Costs: what a step and a drafting pass take, a shape known beforehand bent by what is measured.

seconds(batch, x) = shape(batch, x) · ratio(batch, x), where the ratio is a mean of measured/shape
over nearby points. The shape extrapolates; the ratio makes it true where the server works.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from typing import Self

from qwen3next_plugin.config import Qwen3NextConfig

HORIZON = 500  # observations after which a timing is out of date
WINDOW = 32  # timings kept at one point
REFRESH = 8  # observations between two looks at the measurements


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
        step = linear * c.num_linear_layers + attention * c.num_attention_layers + head
        step += moe * sparse + (c.num_hidden_layers - moe) * 3 * D * c.intermediate_size
        draft = 2 * D * D + attention + head
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

    def touched(self, tokens: int) -> float:
        """Distinct experts that `tokens` tokens are routed to, each choosing at random."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)

    def step_cost(self, tokens: int) -> float:
        return self.step + self.token * tokens + self.step_expert * self.touched(tokens)

    def draft_cost(self, batch: int, passes: int) -> float:
        """The first pass also takes in what the last step committed, about two tokens a request."""
        return self._pass_cost(2 * batch) + (passes - 1) * self._pass_cost(batch)

    def _pass_cost(self, tokens: int) -> float:
        return self.draft + self.draft_token * tokens + self.draft_expert * self.touched(tokens)


class Measured:
    """Measured/shape at points (batch, x), each a trimmed mean of its last timings."""

    def __init__(self) -> None:
        self.count = 0
        self._samples: dict[tuple[float, float], deque[tuple[int, float]]] = {}
        self._means: dict[tuple[float, float], tuple[float, int]] = {}

    def observe(self, batch: int, x: float, ratio: float) -> None:
        """Add one timing; points are half octaves of the batch and halves of x apart."""
        self.count += 1
        point = round(2 * log2(batch)) / 2, round(2 * x) / 2
        samples = self._samples.setdefault(point, deque(maxlen=WINDOW))
        samples.append((self.count, ratio))
        while samples[0][0] <= self.count - HORIZON:
            samples.popleft()
        self._means[point] = trimmed_mean([r for _, r in samples]), len(samples)

    def ratio(self, batch: int, x: float, otherwise: float) -> float:
        """Mean over all points, weighted by timings and nearness; `otherwise` weighs little."""
        total, weight = 0.1 * otherwise, 0.1
        octave = log2(batch)
        for (o, y), (mean, timings) in self._means.items():
            nearness = timings / (0.1 + (o - octave) ** 2 + (y - x) ** 2) ** 2 / 100
            total += nearness * mean
            weight += nearness
        return total / weight


def trimmed_mean(values: list[float]) -> float:
    """Mean of the middle half: a timing is sometimes several times too long."""
    cut = (len(values) + 1) // 4
    middle = sorted(values)[cut : len(values) - cut]
    return sum(middle) / len(middle)


@dataclass(frozen=True, slots=True)
class Table:
    """Seconds at one batch size."""

    step: list[float]  # with 0, 1, 2, … draft tokens in the batch
    draft: list[float]  # of 0, 1, 2, … drafting passes


class Costs:
    """Seconds of steps and drafts for a batch, from a shape and from timings."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._steps, self._drafts = Measured(), Measured()
        self._tables: dict[tuple[int, int], tuple[int, Table]] = {}

    @classmethod
    def from_config(cls, config: Qwen3NextConfig, flop_per_byte: float = 20.0) -> Self:
        return cls(Shape.from_config(config, flop_per_byte))

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """Time of a step of `batch` requests, none of them in prefill, with `tokens` tokens."""
        ratio = seconds / self.shape.step_cost(tokens)
        self._steps.observe(batch, tokens / batch - 1, ratio)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """Time of all `passes` drafting passes after a step of `batch` requests."""
        self._drafts.observe(batch, passes, seconds / self.shape.draft_cost(batch, passes))

    def table(self, batch: int, max_draft: int) -> Table:
        """What a batch costs with up to `max_draft` tokens each; at most a few timings old."""
        now = self._steps.count + self._drafts.count
        since, table = self._tables.get((batch, max_draft), (-1, None))
        if table is None or now - since >= min(REFRESH, 1 + since // 4):
            if len(self._tables) >= 64:  # batch sizes come and go
                self._tables.clear()
            table = Table(
                list(self._step_seconds(batch, max_draft)),
                list(self._draft_seconds(batch, max_draft)),
            )
            self._tables[batch, max_draft] = now, table
        return table

    def _step_seconds(self, batch: int, max_draft: int) -> Iterator[float]:
        """The ratio is looked up at 0, 1, 2, … drafts a request, and straight in between."""
        level = self._steps.ratio(batch, 0, 1.0) if self._steps.count else 1.0
        ratios = [self._steps.ratio(batch, x, level) for x in range(max_draft + 1)]
        for x, (low, high) in enumerate(zip(ratios, ratios[1:], strict=False)):
            for i in range(batch):
                ratio = low + (high - low) * i / batch
                yield self.shape.step_cost(batch * (1 + x) + i) * ratio
        yield self.shape.step_cost(batch * (1 + max_draft)) * ratios[-1]

    def _draft_seconds(self, batch: int, max_draft: int) -> Iterator[float]:
        """Before a draft is timed, drafts are as far off their shape as steps are."""
        level = self._steps.ratio(batch, 0, 1.0)
        yield 0.0
        for passes in range(1, max_draft + 1):
            ratio = self._drafts.ratio(batch, passes, level)
            yield self.shape.draft_cost(batch, passes) * ratio
