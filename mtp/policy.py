"""Policy: how many tokens each request drafts, for the most expected tokens per second.

With draft lengths l_i, a step of B requests yields Σ_i (1 + a_i1 + … + a_i,l_i) tokens on average,
where a_ij = p_i1 ⋯ p_ij and p_ij is the chance that draft j of request i is accepted, given those
before it. The step takes step(B, B + Σ l_i) + draft(B, max l_i) seconds. For a fixed number of
drafting passes the best n draft tokens are the n likeliest ones, so trying every n finds the
optimum.

- Acceptance p comes from acceptance.py, seconds from costs.py.
- A request that skipped the MTP layer catches up before it drafts, and so does one whose prompt was
  just read. That cost is spread over the tokens that the request is expected to still produce.
  One that has caught up counts as if it had a mean one ahead: the next in its place will.
- The plan changes only for one that promises MARGIN more.
- Other plans are tried now and then, the better ones more often, for about BUDGET of the tokens.
- Decisions depend only on what was observed: no clock, no random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.mtp.acceptance import KEEP_ALL, Acceptance, Likeness
from qwen3next_plugin.mtp.costs import Costs, Table

MARGIN = 0.02  # gain in tokens per second for which the plan changes, so that noise does not
BUDGET = 0.004  # share of tokens that trials may cost, by the costs that are believed
TRIAL = 3  # steps of a trial: the first also pays for the pending tokens of requests
ANSWER = 128.0  # tokens of an answer, until some have ended
ANSWERS = 20  # how many answers the mean remembers
LEAST_WORTH = 0.001  # of a draft: the order of drafts stays where none is worth its cost


class Policy:
    """Chooses draft lengths; the engine reports what each step did and took."""

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        """Draft length of each request of the batch, for the draft that is made now.

        `pending`: tokens of each request that the MTP layer reads first if the request drafts,
        besides those of the step that just ended.
        """
        raise NotImplementedError

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        """The step accepted the first `accepted` of the request's `drafted` tokens."""

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` > 0 drafting passes took `seconds`."""

    def forget(self, request: str) -> None:
        """The request has finished."""

    def snapshot(self) -> dict[str, Any]:
        """The policy's estimates, for metrics."""
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


def best_plans(chances: Sequence[Sequence[float]], table: Table) -> list[Plan]:
    """The best plan with 0, 1, … k drafting passes.

    chances [B][k]: that the first j drafts are all accepted; they fall along a row.
    """
    B, k = len(chances), len(table.draft) - 1
    plans = [Plan([0] * B, B, table.step[0])]
    flat = list(chain.from_iterable(chances))
    likeliest = sorted(range(B * k), key=flat.__getitem__, reverse=True)
    for passes in range(1, k + 1):
        drafts = [draft for draft in likeliest if draft % k < passes]
        tokens = list(accumulate((flat[draft] for draft in drafts), initial=float(B)))
        least = next(n for n, draft in enumerate(drafts, 1) if draft % k == passes - 1)
        fixed = table.draft[passes]
        rates = [t / (s + fixed) for t, s in zip(tokens[least:], table.step[least:], strict=False)]
        n = least + rates.index(max(rates))
        lengths = [0] * B
        for draft in drafts[:n]:
            lengths[draft // k] += 1
        plans.append(Plan(lengths, tokens[n], table.step[n] + fixed))
    return plans


class Trials:
    """Follows the best plan, and now and then another one, for what it may show.

    A plan is tried when it would be the best if it were better than it seems, by a little for each
    step since it was last followed. So the worse a plan seems, the less often it is tried.
    """

    def __init__(self, max_draft: int, steps: int) -> None:
        self.steps = steps  # of a trial
        self.hope = BUDGET / TRIAL / max_draft  # how much better a plan may have become in a step
        self.now = 0.0  # steps
        self.followed = [0.0] * (max_draft + 1)  # when the plan with n passes was last followed
        self.plan = 0  # passes of the plan that is followed but for trials
        self.trial, self.left = 0, 0  # passes of the plan that is tried, if not that; steps left

    @property
    def on_trial(self) -> bool:
        return self.trial != self.plan

    def choose(self, plans: Sequence[Plan], catch_up: Sequence[float]) -> int:
        """Which of the plans with 0, 1, … passes. `catch_up`: seconds that each costs once."""
        rates = [plan.tokens / plan.seconds for plan in plans]
        best = max(rates)
        if best > (1 + MARGIN) * rates[self.plan]:
            self.plan = rates.index(best)
        self.followed[self.plan] = self.now
        if self.left:
            self.left -= 1
        else:
            hopes = [
                plan.tokens / (plan.seconds + once / self.steps) * (1 + self.hope * (self.now - at))
                for plan, once, at in zip(plans, catch_up, self.followed, strict=True)
            ]
            hopes[self.plan] = (1 + MARGIN) * rates[self.plan]
            self.trial = hopes.index(max(hopes))
            self.left = self.steps - 1 if self.on_trial else 0
        self.followed[self.trial] = self.now
        return self.trial


class Adaptive(Policy):
    """Draft lengths for the most expected tokens per second, from what was observed."""

    def __init__(
        self,
        max_draft: int,
        costs: Costs,
        plans: Callable[[Sequence[Sequence[float]], Table], list[Plan]] = best_plans,
        trial: int = TRIAL,
    ) -> None:
        """`plans`: those with 0, 1, … passes to choose from; `trial`: steps of a trial."""
        self.max_draft, self.costs, self.plans = max_draft, costs, plans
        self.trials = Trials(max_draft, trial)
        self._all, self._likeness = Acceptance(max_draft, KEEP_ALL), Likeness()
        self._new = Acceptance(max_draft)  # what is known of a request without steps
        self._requests: dict[str, Acceptance] = {}
        self._answer = ANSWER  # mean tokens of an answer
        self._batch = self._drafting = 1  # requests of the last step, and those that draft
        self._pending = 0  # tokens that they read first
        self._catch_up = 0.0  # mean tokens that a request reads before its first drafts

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        """Draft length of each request of the batch, for the draft that is made now."""
        if not requests:
            return []
        B = self._batch = len(requests)
        table = self.costs.table(B, self.max_draft)
        plans = self.plans(self._chances(requests, pending, table), table)
        fed = [sum(t for t, n in zip(pending, p.lengths, strict=True) if n) for p in plans]
        chosen = self.trials.choose(plans, [table.pending * tokens for tokens in fed])
        self._pending, lengths = fed[chosen], plans[chosen].lengths
        self._drafting = max(1, B - lengths.count(0))
        for request, tokens, n in zip(requests, pending, lengths, strict=True):
            if n and self._requests.get(request, self._new).right is None:
                self._catch_up += (tokens - self._catch_up) / ANSWERS
        return lengths

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        self.trials.now += 1 / self._batch
        if request not in self._requests:
            self._requests[request] = Acceptance(self.max_draft)
        known = self._requests[request]
        if drafted:
            self._all.observe(drafted, accepted)
            if known.right is not None:
                self._likeness.observe(known.right, accepted > 0)
        known.observe(drafted, accepted)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self.costs.observe_step(batch, tokens, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        self.costs.observe_draft(self._drafting, passes, self._pending, seconds)

    def forget(self, request: str) -> None:
        if known := self._requests.pop(request, None):
            self._answer += (known.tokens - self._answer) / ANSWERS

    def snapshot(self) -> dict[str, Any]:
        """Acceptance by position, seconds by number of drafts."""
        table = self.costs.table(self._batch, self.max_draft)
        return {
            "acceptance": self._all.along(),
            "step_seconds": table.step[:: self._batch],
            "draft_seconds": table.draft,
            "requests": len(self._requests),
        }

    def _chances(
        self, requests: Sequence[str], pending: Sequence[int], table: Table
    ) -> list[list[float]]:
        """a_ij: the chance that the first j drafts of request i are all accepted.

        Less the tokens lost while the MTP layer reads pending ones, at least as many as before
        most first drafts, spread over the rest of the answer. Answers are taken as geometrically
        long, so what is left is always the mean.
        """
        everyone, pull = self._all.along(), self._likeness.pull
        lost = table.pending * len(requests) / table.step[0] / self._answer  # for each token
        rows = []
        for request, tokens in zip(requests, pending, strict=True):
            row = self._requests.get(request, self._new).chances(everyone, pull)
            if ahead := max(tokens, self._catch_up):
                worth = max(LEAST_WORTH, 1 - lost * ahead * (1 + 1 / sum(row)))
                row = [a * worth for a in row]
            rows.append(row)
        return rows


def make_policy(max_draft: int) -> Policy:
    """The policy that the environment asks for."""
    if env.drafts() == "fixed":
        return Fixed(max_draft)
    return Adaptive(max_draft, Costs())
