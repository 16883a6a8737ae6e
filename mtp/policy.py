"""Policy: how many tokens each request drafts, for the most expected tokens per second.

With draft lengths l_i, a step of B requests yields Σ_i (1 + a_i1 + … + a_i,l_i) tokens on average,
where a_ij = p_i1 ⋯ p_ij and p_ij is the chance that draft j of request i is accepted, given those
before it. The step takes step(B, B + Σ l_i) + draft(B, max l_i) seconds. For a fixed number of
drafting passes the best n draft tokens are the n likeliest ones, so trying every n finds the
optimum.

- Acceptance p comes from acceptance.py, seconds from costs.py.
- The plan changes only for one that promises MARGIN more, so that noise does not move it.
- A request that skipped the MTP layer catches up before it drafts, and so does one whose prompt was
  just read. That cost is spread over the tokens that the request is expected to still produce.
- Other plans are tried now and then, for at most BUDGET of the time, and less often while trials
  change nothing.
- Decisions depend only on what was observed: no clock, no random numbers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.mtp.acceptance import KEEP, KEEP_ALL, Acceptance
from qwen3next_plugin.mtp.costs import Costs, Table

MARGIN = 0.03  # gain in tokens per second for which the plan changes
BUDGET = 0.01  # share of time that trials may cost
CREDIT = 1.0  # what trials may cost at the start, in steps
TRIAL = 3  # steps of a trial: the first also pays for the pending tokens of requests
LEAST = 0.12  # least price of a trial, in steps, even if it promises to lose less
HELD = 30  # a plan kept for so many steps gets one more trial before another replaces it
PATIENCE = 1  # how often the budget is halved while trials change nothing
RECENT = 0.05  # weight of the last step in the share of steps that read prompts
ANSWER = 128.0  # mean tokens of an answer, until answers have ended
LEAST_WORTH = 0.001  # of a draft: the order of drafts stays where none is worth its cost
ANSWERS = 20  # how many answers the mean remembers


class Policy(Protocol):
    """Chooses draft lengths; the engine reports what each step did and took."""

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        """Draft length of each request of the batch, for the draft that is made now.

        `pending`: tokens of each request that the MTP layer reads first if the request drafts,
        besides those of the step that just ended.
        """

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        """The step accepted the first `accepted` of the request's `drafted` tokens."""

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A step of `batch` requests and `tokens` tokens, without prefill, took `seconds`."""

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        """After a step of `batch` requests, `passes` > 0 drafting passes took `seconds`."""

    def forget(self, request: str) -> None:
        """The request has finished."""

    def snapshot(self) -> dict[str, Any]:
        """The policy's estimates and last decision, for metrics."""


@dataclass(frozen=True)
class Fixed:
    """Every request drafts `length` tokens."""

    length: int

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
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


@dataclass(frozen=True, slots=True)
class Plan:
    """Draft lengths, and the tokens and seconds that they promise for one step."""

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
    """The plan with these lengths; chances [B][k] that the first j drafts are all accepted."""
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


def pending_tokens(pending: Sequence[int], plan: Plan) -> int:
    """How many pending tokens the MTP layer reads first with this plan."""
    return sum(tokens for tokens, n in zip(pending, plan.lengths, strict=True) if n)


class Adaptive:
    """Draft lengths for the most expected tokens per second, from what was observed."""

    def __init__(
        self, max_draft: int, costs: Costs, *, uniform: bool = False, trial: int = TRIAL
    ) -> None:
        """`uniform`: give all requests of a step one length, for engines that need that.

        `trial`: steps of a trial.
        """
        self.max_draft, self.costs, self.uniform = max_draft, costs, uniform
        self.trial = trial
        self._step, self._verified = 0, 0  # steps; requests observed since lengths were chosen
        self._all = Acceptance(max_draft, KEEP_ALL, least=5.0)
        self._requests: dict[str, Acceptance] = {}
        self._tokens = Counter[str]()  # that each request has produced
        self._answer = ANSWER  # mean tokens of an answer
        self._last: list[int] = []  # lengths
        self._pending = 0  # how many pending tokens the current draft takes in first
        self._timed, self._untimed = True, 0.0  # was the last step timed; share that was not
        # The plan, and trials of others. A plan is known by its number of drafting passes; the
        # plan that drafts for one request alone has the number max_draft + 1.
        self._passes, self._held = 0, 0  # current plan, and steps since it was chosen
        self._trial, self._left = 0, 0  # plan on trial, and steps left of the trial
        self._chosen = ""  # the request that drafts in a trial of one request alone
        self._credit, self._halvings = CREDIT, 0  # what trials may cost, in steps
        self._tried = [0] * (max_draft + 2)  # step that last followed each plan

    @property
    def on_trial(self) -> bool:
        """Whether a trial goes on."""
        return self._left > 0

    @property
    def _untried(self) -> bool:
        """Nothing was drafted yet, so the costs of drafts are guesses."""
        return not any(self._tried[1:])

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        """Draft length of each request of the batch, for the draft that is made now."""
        if not requests:
            return []
        # An engine that drafts nothing may ask only now and then.
        steps = max(1, round(self._verified / len(requests)))
        self._step, self._verified = self._step + steps, 0
        chances = self._chances(requests)
        table = self.costs.table(len(requests), self.max_draft).among_prompts(self._prompts(steps))
        price_of_pending = table.pending * len(requests) / table.step[0]  # tokens of all requests
        chances = [
            self._worth(row, price_of_pending * tokens) if tokens else row
            for row, tokens in zip(chances, pending, strict=True)
        ]
        plans = self._plans(chances, table)
        plan = self._settle(plans)
        if self._untried:  # a first trial with all requests observes the most
            plans[1] = price([1] * len(requests), chances, table)
        if not plan.passes and not self.uniform:
            # Drafting for all would first take in their pending tokens: offer one request alone.
            plans.append(self._alone(requests, chances, table))
        catch_up = [table.pending * pending_tokens(pending, p) for p in plans]
        plan = self._try(plans, plan, catch_up, steps)
        self._pending = pending_tokens(pending, plan)
        self._last = plan.lengths
        return plan.lengths

    def observe_verify(self, request: str, drafted: int, accepted: int) -> None:
        self._verified += 1
        self._tokens[request] += 1 + accepted
        if drafted:
            if request not in self._requests:
                self._requests[request] = Acceptance(self.max_draft, KEEP, least=0.0)
            for acceptance in (self._requests[request], self._all):
                acceptance.observe(drafted, accepted, self._step)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self._timed = True
        self.costs.observe_step(batch, tokens, seconds)

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        if self._pending > batch:  # more than drafts usually take in
            self.costs.observe_catching_up(batch, passes, self._pending, seconds)
        else:
            self.costs.observe_draft(batch, passes, seconds)

    def forget(self, request: str) -> None:
        self._requests.pop(request, None)
        if tokens := self._tokens.pop(request, 0):
            self._answer += (tokens - self._answer) / ANSWERS

    def snapshot(self) -> dict[str, Any]:
        """Lengths of the last step, acceptance by position, seconds by number of drafts."""
        batch = max(1, len(self._last))
        table = self.costs.table(batch, self.max_draft)
        return {
            "lengths": dict(sorted(Counter(self._last).items())),
            "acceptance": list(self._all.means),
            "step_seconds": table.step[::batch],
            "draft_seconds": table.draft,
            "on_trial": self.on_trial,
            "requests": len(self._tokens),
        }

    def _chances(self, requests: Sequence[str]) -> list[list[float]]:
        """a_ij: the chance that the first j drafts of request i are all accepted."""
        everyone = list(self._all.estimates(self._step))
        newcomer = list(accumulate(everyone, mul))
        known = (self._requests.get(request) for request in requests)
        return [
            list(accumulate(a.towards(everyone, self._step), mul)) if a else newcomer for a in known
        ]

    def _worth(self, chances: list[float], lost: float) -> list[float]:
        """The chances less the tokens `lost` by catching up, spread over the rest of the answer.

        Answers are taken as geometrically long, so what is left is always the mean.
        """
        gain = sum(chances)
        share = 1 - lost / self._answer * (1 + gain) / gain
        return [a * max(LEAST_WORTH, share) for a in chances]

    def _plans(self, chances: Sequence[Sequence[float]], table: Table) -> list[Plan]:
        """The plans to choose from, with 0, 1, … k drafting passes."""
        if not self.uniform:
            return best_plans(chances, table)
        return [price([n] * len(chances), chances, table) for n in range(self.max_draft + 1)]

    def _prompts(self, steps: int) -> float:
        """Share of recent steps that read prompts: those that no engine timed."""
        self._untimed += ((not self._timed) - self._untimed) * (1 - (1 - RECENT) ** steps)
        self._timed = False
        return self._untimed

    def _alone(
        self, requests: Sequence[str], chances: Sequence[Sequence[float]], table: Table
    ) -> Plan:
        """One draft for the least observed request; a trial keeps to one request."""
        if not self._left or self._chosen not in requests:
            self._chosen = min(reversed(requests), key=self._observations)
        return price([int(r == self._chosen) for r in requests], chances, table)

    def _observations(self, request: str) -> float:
        """Observations behind the estimate of a request's first draft."""
        acceptance = self._requests.get(request)
        return acceptance.weight(0, self._step) if acceptance else 0.0

    def _settle(self, plans: list[Plan]) -> Plan:
        """The best plan if it is better by MARGIN, else the one with as many passes as before."""
        best, kept = max(plans, key=lambda plan: plan.rate), plans[self._passes]
        return best if best.rate > kept.rate * (1 + MARGIN) else kept

    def _try(self, plans: list[Plan], plan: Plan, catch_up: list[float], steps: int) -> Plan:
        """The plan, or another one if a trial of it is due and within the budget."""
        if plan.passes != self._passes:
            self._change(plan)
        self._held += steps
        self._tried[plan.passes] = self._step
        self._credit += steps * (BUDGET if plan.passes else BUDGET / 2**self._halvings)
        if not self._left:
            loss = self._losses(plans, plan, catch_up)
            due = max(loss, key=lambda n: (self._step - self._tried[n]) / loss[n] ** 2)
            if loss[due] > self._credit:
                return plan
            self._credit -= loss[due]
            self._trial, self._left = due, self.trial
        self._left -= 1
        if not self._left:
            self._halvings = min(PATIENCE, self._halvings + 1)
        self._tried[self._trial] = self._step
        return plans[self._trial]

    def _change(self, plan: Plan) -> None:
        """Change the plan. Something has changed, so trials may pay again."""
        if self._held >= HELD:  # perhaps the whole machine has: time the old plan once more
            self._trial, self._left = self._passes, self.trial
        else:
            self._left = 0
        self._passes, self._held, self._halvings = plan.passes, 0, 0

    def _losses(self, plans: list[Plan], plan: Plan, catch_up: list[float]) -> dict[int, float]:
        """What a trial of each other plan is expected to lose, in steps of `plan`."""
        loss = {}
        for n, other in enumerate(plans):
            if n != plan.passes:
                tokens = self.trial * (other.seconds * plan.rate - other.tokens)
                loss[n] = max(LEAST, (tokens + catch_up[n] * plan.rate) / plan.tokens)
        if self._untried:  # no drafting pass was timed yet: a guess must not forbid the first
            loss[1] = LEAST
        return loss


def make_policy(config: Qwen3NextConfig, max_draft: int) -> Policy:
    """The policy that the environment asks for."""
    if env.drafts() == "fixed":
        return Fixed(max_draft)
    return Adaptive(max_draft, Costs.from_config(config))
