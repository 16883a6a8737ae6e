"""Policy: how many tokens each request drafts, for the most expected tokens per second.

With draft lengths l_i, a step of B requests yields Σ_i (1 + a_i1 + … + a_i,l_i) tokens on average,
where a_ij is the chance that the first j drafts of request i are all accepted (acceptance.py). It
takes step(B, B + Σ l_i) + draft(B, max l_i) seconds (costs.py). For a fixed number of drafting
passes the best n draft tokens are the n likeliest ones, so trying every n finds the optimum.
Decisions depend only on what was observed: no clock, no random numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import mul
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.mtp.acceptance import KEEP_ALL, Acceptance
from qwen3next_plugin.mtp.costs import Costs, Table

PRIOR, PRIOR_WEIGHT = 0.8, 5.0  # prior acceptance, and its weight in observations
PULL = 16.0  # weight of all requests' acceptance in one request's estimate, in observations
MARGIN = 0.02  # relative gain needed to change the plan, so that noise does not change it
BUDGET = 0.004  # share of tokens that trials may cost, by the current estimates
TRIAL = 3  # steps of a trial: the first also pays for the pending tokens of requests
ANSWER, ANSWERS = 128.0, 20  # initial mean tokens of an answer; answers that the mean remembers

Chances = Sequence[Sequence[float]]  # a_ij, by request and number of drafts


class Policy:
    """Chooses draft lengths; the engine reports what each step did and took."""

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        """Draft length of each request of the batch, for the draft that is made now.

        `pending`: tokens of each request that the MTP layer reads first if the request drafts,
        besides those of the step that just ended.
        """
        raise NotImplementedError

    def observe_verify(self, request: str, drafted: int, accepted: int, steps: int = 1) -> None:
        """The step, or each of `steps`, accepted the first `accepted` of `drafted` tokens."""

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` > 0 drafting passes took `seconds`."""

    def forget(self, request: str) -> None:
        """The request has finished."""

    def snapshot(self) -> dict[str, Any]:
        """Estimates, for metrics: acceptance by position, seconds by number of drafts."""
        return {}


@dataclass(frozen=True)
class Fixed(Policy):
    """Every request drafts `length` tokens."""

    length: int

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        return [self.length] * len(requests)


@dataclass(frozen=True, slots=True)
class Plan:
    """Draft lengths, and the tokens and seconds that they promise for one step."""

    lengths: list[int]
    tokens: float
    seconds: float


def best_plans(chances: Chances, table: Table) -> list[Plan]:
    """The best plan with 0, 1, 2, … drafting passes."""
    B, num_drafts = len(chances), len(table.draft) - 1
    plans = [Plan([0] * B, B, table.step[0])]
    flat = list(chain.from_iterable(chances))
    likeliest = sorted(range(B * num_drafts), key=flat.__getitem__, reverse=True)
    for passes in range(1, num_drafts + 1):
        drafts = [draft for draft in likeliest if draft % num_drafts < passes]
        tokens = list(accumulate((flat[draft] for draft in drafts), initial=float(B)))
        least = next(n for n, draft in enumerate(drafts, 1) if draft % num_drafts == passes - 1)
        fixed = table.draft[passes]
        n = max(range(least, len(tokens)), key=lambda n: tokens[n] / (table.step[n] + fixed))
        lengths = [0] * B
        for draft in drafts[:n]:
            lengths[draft // num_drafts] += 1
        plans.append(Plan(lengths, tokens[n], table.step[n] + fixed))
    return plans


class Adaptive(Policy):
    """Draft lengths for the most expected tokens per second, from what was observed.

    It follows the best plan. A plan's bonus grows with each step since it was last followed;
    it is tried when the bonus makes it the best. So the worse a plan seems, the rarer its trials.
    """

    plans = staticmethod(best_plans)  # those with 0, 1, … passes to choose from
    trial_steps = TRIAL

    def __init__(self, num_drafts: int, costs: Costs) -> None:
        self.num_drafts, self.costs = num_drafts, costs
        self.hope = BUDGET / TRIAL / num_drafts  # bonus of a plan per step
        self.steps = 0.0
        self.plan = 0  # drafting passes of the plan in use, apart from trials
        self.trial, self.left = 0, 0  # passes of the plan on trial; its remaining steps
        self._followed = [0.0] * (num_drafts + 1)  # when the plan with n passes was last followed
        self._all, self._new = Acceptance(num_drafts, KEEP_ALL), Acceptance(num_drafts)
        self._prior = [PRIOR] * num_drafts
        self._requests: dict[str, Acceptance] = {}
        self._answer = ANSWER  # mean tokens of an answer
        self._catch_up = 0.0  # mean tokens that a request reads before its first drafts
        self._batch, self._drafting, self._pending = 1, 1, 0  # requests, drafting, tokens they read

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        if not requests:
            return []
        B = self._batch = len(requests)
        known = [self._requests.get(request, self._new) for request in requests]
        table = self.costs.table(B, self.num_drafts)
        plans = self.plans(self._chances(known, pending, table), table)
        fed = [sum(t for t, n in zip(pending, p.lengths, strict=True) if n) for p in plans]
        chosen = self._choose(plans, [table.pending * tokens for tokens in fed])
        self._pending, lengths = fed[chosen], plans[chosen].lengths
        self._drafting = max(1, B - lengths.count(0))
        for one, tokens, n in zip(known, pending, lengths, strict=True):
            if n and not one.seen[0]:
                self._catch_up += (tokens - self._catch_up) / ANSWERS
        return lengths

    def observe_verify(self, request: str, drafted: int, accepted: int, steps: int = 1) -> None:
        self.steps += steps / self._batch
        known = self._requests.setdefault(request, Acceptance(self.num_drafts))
        known.observe(drafted, accepted, steps)
        if drafted:
            self._all.observe(drafted, accepted)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self.costs.observe_step(batch, tokens, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        self.costs.observe_draft(self._drafting, passes, self._pending, seconds)

    def forget(self, request: str) -> None:
        if known := self._requests.pop(request, None):
            self._answer += (known.tokens - self._answer) / ANSWERS

    def snapshot(self) -> dict[str, Any]:
        found: dict[str, Any] = {"acceptance": self._all.chances(self._prior, PRIOR_WEIGHT)}
        if self.costs.timed:
            table = self.costs.table(self._batch, self.num_drafts)
            found |= {"step_seconds": table.step[:: self._batch], "draft_seconds": table.draft}
        return found

    def _choose(self, plans: Sequence[Plan], catch_up: Sequence[float]) -> int:
        """Passes of the plan to follow now. `catch_up`: each plan's one-time seconds."""
        rates = [plan.tokens / plan.seconds for plan in plans]
        if max(rates) > (1 + MARGIN) * rates[self.plan]:
            self.plan = rates.index(max(rates))
        self._followed[self.plan] = self.steps
        self.left -= 1
        if self.left <= 0:
            hopes = []
            for plan, once, at in zip(plans, catch_up, self._followed, strict=True):
                rate = plan.tokens / (plan.seconds + once / self.trial_steps)
                hopes.append(rate * (1 + self.hope * (self.steps - at)))
            hopes[self.plan] = (1 + MARGIN) * rates[self.plan]
            self.trial = hopes.index(max(hopes))
            self.left = self.trial_steps if self.trial != self.plan else 0
        self._followed[self.trial] = self.steps
        return self.trial

    def _chances(self, known: list[Acceptance], pending: Sequence[int], table: Table) -> Chances:
        """The a_ij of each request, less what its pending tokens cost.

        The time to read them is spread over a mean answer. A request without pending tokens counts
        as having a mean number, because the request that replaces it will.
        """
        everyone = self._all.chances(self._prior, PRIOR_WEIGHT)
        lost = table.pending * len(known) / table.step[0] / self._answer  # for each token
        rows = []
        for one, tokens in zip(known, pending, strict=True):
            row = list(accumulate(one.chances(everyone, PULL), mul))
            worth = 1 - lost * max(tokens, self._catch_up) * (1 + 1 / sum(row))
            rows.append([a * max(0.0, worth) for a in row])
        return rows


def make_policy(num_drafts: int) -> Policy:
    """The policy that the environment asks for."""
    return Fixed(num_drafts) if env.drafts() == "fixed" else Adaptive(num_drafts, Costs())
