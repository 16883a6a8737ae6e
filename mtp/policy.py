"""Schedule: how many tokens each request drafts, for the most expected tokens per second.

Of request i with draft length l_i, a step yields 1 + a_i1 + … + a_i,l_i tokens in expectation,
where a_ij = p_i1 ⋯ p_ij and p_ij is the chance that draft j is accepted, given those before it.
It takes step(B, B + Σ l_i) + draft(B, max l_i) seconds. For a given number of drafting passes the
best n draft tokens are the n likeliest, so the best plan is found exactly by trying every n.

- Acceptance: counts per request and position that forget, drawn towards those of all requests.
- Costs: `costs.py`, from timings.
- The plan is kept until another promises MARGIN more, so that noise does not move it.
- Plans not in use are tried now and then, for BUDGET of the time at most, and less and less often
  while that changes nothing. No clock and no chance: equal observations, equal decisions.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.mtp.costs import Costs, Table

MAX_LAG = 256  # tokens by which an engine lets a request that skips the drafter fall behind
MARGIN = 0.02  # gain for which a plan is left
BUDGET = 0.01  # share of time for trying others
CREDIT = 1.0  # steps of time for trying others at the start
TRIAL = 3  # steps that a trial takes: the first pays for what the drafter has to catch up with
LEAST = 0.12  # of a step: what a trial is charged even if it promises to lose less
HELD = 30  # steps that a plan was kept before it is left only after one more look
PATIENCE = 1  # how often the budget halves while trials change nothing

RECENT = 0.05  # weight of the last step in the share of steps that read prompts
PRIOR = 0.8  # acceptance where nothing is known
KEEP, KEEP_ALL = 0.95, 0.98  # what an observation leaves of those before: per request, of all
FADE = 0.98  # what a step without observation leaves of them
CHAIN = 5.0  # weight of a position in the estimate of the next
PULL = 8.0  # weight of all requests in the estimate of one, in observations


class Policy(Protocol):
    """What an engine asks, and what it reports."""

    def lengths(self, requests: Sequence[str]) -> list[int]:
        """Draft length of each request of the batch, for the draft to be made now."""

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        """Of a request's `drafted` tokens the step accepted the first `accepted`."""

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests without prefill, `tokens` tokens in all, took `seconds`."""

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` > 0 drafting passes took `seconds`."""

    def forget(self, request: str) -> None:
        """The request has finished."""

    def snapshot(self) -> dict[str, Any]:
        """What is known and decided now, for metrics."""


@dataclass(frozen=True)
class Fixed:
    """Every request drafts `length` tokens."""

    length: int

    def lengths(self, requests: Sequence[str]) -> list[int]:
        return [self.length] * len(requests)

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        pass

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        pass

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        pass

    def forget(self, request: str) -> None:
        pass

    def snapshot(self) -> dict[str, Any]:
        return {"lengths": {self.length: 1}}


class Acceptance:
    """Chances that draft 1, 2, … is accepted, given those before it: means that forget.

    A mean weighs as many observations as it remembers. What it remembers fades by `keep` in a step
    that observes more, and by FADE in one that does not.
    """

    def __init__(self, max_draft: int, keep: float, least: float) -> None:
        self.keep, self.least = keep, least
        self.means = [PRIOR] * max_draft
        self._weights = [least] * max_draft
        self._seen = [0] * max_draft  # the step of the last observation

    def observe(self, drafted: int, accepted: int, now: int) -> None:
        """Positions up to the first rejected one were tried."""
        for j in range(min(drafted, accepted + 1)):
            weight = self.weight(j, now)
            if now != self._seen[j]:
                weight = max(self.least, self.keep * weight)
            self.means[j] += ((j < accepted) - self.means[j]) / (weight + 1)
            self._weights[j], self._seen[j] = weight + 1, now

    def weight(self, j: int, now: int) -> float:
        idle = now - self._seen[j] - 1
        return self._weights[j] * FADE**idle if idle > 0 else self._weights[j]

    def estimates(self, now: int) -> Iterator[float]:
        """The means, each drawn towards the estimate of the position before."""
        before = self.means[0]
        for j, mean in enumerate(self.means):
            before = mean + (before - mean) * CHAIN / (self.weight(j, now) + CHAIN)
            yield before

    def towards(self, others: Sequence[float], now: int) -> Iterator[float]:
        """The means, drawn towards those of all requests."""
        for j, (mean, other) in enumerate(zip(self.means, others, strict=True)):
            weight = self.weight(j, now)
            yield other + (mean - other) * weight / (weight + PULL)


@dataclass(frozen=True, slots=True)
class Plan:
    """Draft lengths, and what they promise for one step."""

    lengths: list[int]
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def passes(self) -> int:
        return max(self.lengths, default=0)


def price(lengths: list[int], chances: Sequence[Sequence[float]], table: Table) -> Plan:
    """What given lengths promise; chances [B][k] that all of the first j drafts are accepted."""
    tokens = len(lengths) + sum(sum(row[:n]) for row, n in zip(chances, lengths, strict=True))
    seconds = table.step[sum(lengths)] + table.draft[max(lengths, default=0)]
    return Plan(lengths, tokens, seconds)


def best_plans(chances: Sequence[Sequence[float]], table: Table) -> list[Plan]:
    """The best plan with 0, 1, … k drafting passes; chances [B][k] fall along a row."""
    B, k = len(chances), len(table.draft) - 1
    plans = [price([0] * B, chances, table)]
    likeliest = sorted((-a, j, i) for i, row in enumerate(chances) for j, a in enumerate(row, 1))
    for passes in range(1, k + 1):
        drafts = [draft for draft in likeliest if draft[1] <= passes]
        tokens = list(accumulate((-a for a, _, _ in drafts), initial=float(B)))
        least = next(n for n, (_, j, _) in enumerate(drafts, 1) if j == passes)
        fixed = table.draft[passes]
        rates = [t / (s + fixed) for t, s in zip(tokens[least:], table.step[least:], strict=False)]
        n = least + rates.index(max(rates))
        lengths = [0] * B
        for _, _, i in drafts[:n]:
            lengths[i] += 1
        plans.append(Plan(lengths, tokens[n], table.step[n] + fixed))
    return plans


class Schedule:
    """Draft lengths for the most expected tokens per second, from what is observed."""

    def __init__(self, max_draft: int, costs: Costs, *, uniform: bool = False) -> None:
        """`uniform`: all requests of a step draft as much, where an engine verifies so."""
        self.max_draft, self.costs, self.uniform = max_draft, costs, uniform
        self._step = 0
        self._all = Acceptance(max_draft, KEEP_ALL, least=5.0)
        self._requests: dict[str, Acceptance] = {}
        self._last: list[int] = []
        self._idle: dict[str, int] = {}  # steps without draft, of the requests of the batch
        self._lag = 0  # tokens, about, that the draft of now has to catch up with
        self._timed, self._untimed = True, 0.0  # the step before; share of steps
        # trials
        self._passes, self._held = 0, 0  # of the plan, and for how many steps it has been that
        self._trial, self._left = 0, 0  # plan on trial, steps left of it
        self._chosen = ""  # the request on trial, where nothing else is drafted
        self._credit, self._halvings = CREDIT, 0  # of time, in steps
        self._tried = [0] * (max_draft + 2)  # step that last followed the plan

    @property
    def _untried(self) -> bool:
        """Whether nothing has been drafted yet, so that costs of drafts are guesses."""
        return not any(self._tried[1:])

    def lengths(self, requests: Sequence[str]) -> list[int]:
        """Draft length of each request of the batch, for the draft to be made now."""
        self._step += 1
        if not requests:
            return []
        chances = self._chances(requests)
        table = self.costs.table(len(requests), self.max_draft).among_prompts(self._prompts())
        plans = self._plans(chances, table)
        plan = self._settle(plans)
        if self._untried:  # what is tried first tells most where all requests draft
            plans[1] = price([1] * len(requests), chances, table)
        if not plan.passes and not self.uniform:
            # the drafter would have much to catch up with: one request less
            plans.append(self._alone(requests, chances, table))
        plan = self._try(plans, plan, [table.behind * self._behind(requests, p) for p in plans])
        self._lag = self._behind(requests, plan)
        self._note(requests, plan.lengths)
        return plan.lengths

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        if drafted:
            if request not in self._requests:
                self._requests[request] = Acceptance(self.max_draft, KEEP, least=0.0)
            for acceptance in (self._requests[request], self._all):
                acceptance.observe(drafted, accepted, self._step)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self._timed = True
        self.costs.observe_step(batch, tokens, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        if self._lag > batch:  # not what a draft usually takes
            self.costs.observe_catching_up(batch, passes, self._lag, seconds)
        else:
            self.costs.observe_draft(batch, passes, seconds)

    def forget(self, request: str) -> None:
        self._requests.pop(request, None)

    def snapshot(self) -> dict[str, Any]:
        """Lengths of the last step, acceptance by position, seconds by drafts, share of trials."""
        batch = max(1, len(self._last))
        table = self.costs.table(batch, self.max_draft)
        return {
            "lengths": dict(sorted(Counter(self._last).items())),
            "acceptance": list(self._all.means),
            "step_seconds": table.step[::batch],
            "draft_seconds": table.draft,
            "on_trial": self._left > 0,
            "requests": len(self._requests),
        }

    def _chances(self, requests: Sequence[str]) -> list[list[float]]:
        """a_ij: that the first j drafts of request i are all accepted."""
        everyone = list(self._all.estimates(self._step))
        newcomer = list(accumulate(everyone, mul))
        known = (self._requests.get(request) for request in requests)
        return [
            list(accumulate(a.towards(everyone, self._step), mul)) if a else newcomer for a in known
        ]

    def _plans(self, chances: Sequence[Sequence[float]], table: Table) -> list[Plan]:
        """The plans with 0, 1, … k drafting passes to choose from."""
        if not self.uniform:
            return best_plans(chances, table)
        return [price([n] * len(chances), chances, table) for n in range(self.max_draft + 1)]

    def _prompts(self) -> float:
        """Share of steps that also read prompts: of late, those that nobody timed."""
        self._untimed += ((not self._timed) - self._untimed) * RECENT
        self._timed = False
        return self._untimed

    def _behind(self, requests: Sequence[str], plan: Plan) -> int:
        """Tokens, about, that the drafter has to catch up with first."""
        return sum(self._idle.get(r, 0) for r, n in zip(requests, plan.lengths, strict=True) if n)

    def _note(self, requests: Sequence[str], lengths: list[int]) -> None:
        """What was decided, and which requests skip the drafter."""
        idle = {r: self._idle.get(r, 0) for r in requests}
        self._idle = {
            r: 0 if n else min(MAX_LAG, idle[r] + 1) for r, n in zip(requests, lengths, strict=True)
        }
        self._last = lengths

    def _known(self, request: str) -> float:
        """Observations that the estimate of a request's first draft rests on."""
        acceptance = self._requests.get(request)
        return acceptance.weight(0, self._step) if acceptance else 0.0

    def _alone(
        self, requests: Sequence[str], chances: Sequence[Sequence[float]], table: Table
    ) -> Plan:
        """One draft for the request of which least is known, during a trial the same one."""
        if not self._left or self._chosen not in requests:
            self._chosen = min(reversed(requests), key=self._known)
        return price([int(r == self._chosen) for r in requests], chances, table)

    def _settle(self, plans: list[Plan]) -> Plan:
        """The best plan; one with as many passes as before unless another is better by MARGIN."""
        best, kept = max(plans, key=lambda plan: plan.rate), plans[self._passes]
        return best if best.rate > kept.rate * (1 + MARGIN) else kept

    def _try(self, plans: list[Plan], plan: Plan, lags: list[float]) -> Plan:
        """The plan, or another that is due for a trial and whose loss the budget covers."""
        if plan.passes != self._passes:  # things have changed: trials may pay again
            if self._held >= HELD:  # or is it the machine, for all plans alike?
                self._trial, self._left = self._passes, TRIAL
            else:
                self._left = 0
            self._passes, self._held, self._halvings = plan.passes, 0, 0
        self._held += 1
        self._tried[plan.passes] = self._step
        self._credit += BUDGET if plan.passes else BUDGET / 2**self._halvings
        if not self._left:
            loss = {
                n: max(
                    LEAST,
                    (TRIAL * (p.seconds * plan.rate - p.tokens) + lags[n] * plan.rate)
                    / plan.tokens,
                )
                for n, p in enumerate(plans)
                if n != plan.passes
            }
            if self._untried:  # no pass was ever timed: a guess must not forbid it
                loss[1] = LEAST
            due = max(loss, key=lambda n: (self._step - self._tried[n]) / loss[n] ** 2)
            if loss[due] > self._credit:
                return plan
            self._credit -= loss[due]
            self._trial, self._left = due, TRIAL
        self._left -= 1
        if not self._left:
            self._halvings = min(PATIENCE, self._halvings + 1)
        self._tried[self._trial] = self._step
        return plans[self._trial]


def make_policy(
    config: Qwen3NextConfig, max_draft: int, *, flop_per_byte: float, uniform: bool = False
) -> Policy:
    """The policy that the environment asks for."""
    if env.drafts() == "fixed":
        return Fixed(max_draft)
    return Schedule(max_draft, Costs.from_config(config, flop_per_byte), uniform=uniform)
