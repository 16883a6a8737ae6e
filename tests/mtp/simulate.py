"""A simulated server: known acceptance, known costs, and noisy timings.

Acceptance is fixed in advance: `runs[t]` is how many drafts are right after t tokens of a request,
so every policy serves the same requests. The result counts true costs; policies observe noisy ones.
Like the engines it reports no step in which a prompt is read, and drafts for no request in that
step: the prompt is pending, and the drafter reads it when the request first drafts.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from qwen3next_plugin.mtp.policy import Policy

Run = Sequence[int]

COLD = 3.0


@dataclass(frozen=True)
class Truth:
    """Seconds, in any unit, of an engine step and of the passes of a draft."""

    fixed: float  # a step
    request: float = 0.0
    token: float = 0.0
    expert: float = 0.0  # a distinct expert, in all layers
    prompt_token: float = 0.0
    experts: int = 512
    per_token: int = 10
    layer: float = 0.0  # a drafting pass, without its experts and the head
    head: float = 0.0
    draft_token: float = 0.0
    draft_expert: float = 0.0

    def step(self, batch: int, tokens: int, prompt: int = 0) -> float:
        seconds = self.fixed + self.request * batch + self.token * tokens
        return seconds + self.expert * self.touched(tokens + prompt) + self.prompt_token * prompt

    def draft(self, fed: int, lengths: Sequence[int]) -> float:
        """A pass over `fed` tokens, the head for `lengths`, and further passes over drafts."""
        seconds = self._pass(fed) + (self.head if any(lengths) else 0.0)
        for depth in range(1, max(lengths)):
            seconds += self._pass(sum(length > depth for length in lengths)) + self.head
        return seconds

    def _pass(self, tokens: int) -> float:
        return self.layer + self.draft_token * tokens + self.draft_expert * self.touched(tokens)

    def touched(self, tokens: int) -> float:
        return touched(self.experts, self.per_token, tokens)


@cache
def touched(experts: int, per_token: int, tokens: int) -> float:
    """Distinct experts that so many tokens are routed to; none in a dense model."""
    return experts and experts * (1 - (1 - per_token / experts) ** tokens)


@dataclass
class Trace:
    """Requests served in order, `concurrency(tokens done)` of them at a time."""

    runs: list[Run]
    truth: Callable[[int], Truth]  # after so many tokens in all
    concurrency: Callable[[int], int]
    prompt: int = 100  # tokens
    noise: float = 0.2
    outliers: float = 0.03
    cold: int = 0  # first timings of drafts that are observed COLD times too long


@dataclass
class Result:
    tokens: int = 0
    seconds: float = 0.0
    drafting: float = 0.0  # of these seconds
    lengths: list[list[int]] = field(default_factory=list)  # of each step

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class Request:
    name: str
    runs: Run
    done: int = 0
    pending: int = 0  # tokens of earlier steps that the drafter has not seen
    committed: int = 0  # tokens of the step that just ended
    drafted: int = 0
    fresh: bool = True  # its prompt is read in this step


class Server:
    """Serves a trace with a policy."""

    def __init__(self, trace: Trace, policy: Policy, seed: int) -> None:
        self.trace, self.policy, self.rng = trace, policy, random.Random(seed)
        self.waiting = [Request(f"r{i}", runs) for i, runs in enumerate(trace.runs)][::-1]
        self.active: list[Request] = []
        self.result, self.drafts = Result(), 0

    def run(self) -> Result:
        while self.waiting or self.active:
            tokens = self.result.tokens
            while self.waiting and len(self.active) < self.trace.concurrency(tokens):
                self.active.append(self.waiting.pop())
            truth = self.trace.truth(tokens)
            step, draft = self.step(truth), self.draft(truth)
            self.result.seconds += step + draft
            self.result.drafting += draft
        return self.result

    def step(self, truth: Truth) -> float:
        """The engine's part: reads prompts, verifies drafts."""
        fresh = [r for r in self.active if r.fresh]
        B, T = len(self.active), len(self.active) + sum(r.drafted for r in self.active)
        seconds = truth.step(B, T - len(fresh), self.trace.prompt * len(fresh))
        if not fresh:
            self.policy.observe_step(B, T, self.timed(seconds))
        for r in self.active:
            self.verify(r)
        return seconds

    def verify(self, r: Request) -> None:
        accepted = min(r.drafted, r.runs[r.done])
        if not r.fresh:
            self.policy.observe_verify(r.name, r.drafted, accepted)
        tokens = min(1 + accepted, len(r.runs) - r.done)
        r.done += tokens
        r.committed = self.trace.prompt if r.fresh else tokens
        self.result.tokens += tokens
        if r.done == len(r.runs):
            self.policy.forget(r.name)

    def draft(self, truth: Truth) -> float:
        """The drafter's part."""
        self.active = [r for r in self.active if r.done < len(r.runs)]
        asked = [r for r in self.active if not r.fresh]
        for r in self.active:
            if r.fresh:
                r.fresh, r.pending = False, r.committed
        if not asked:
            return 0.0
        lengths = self.policy.lengths([r.name for r in asked], [r.pending for r in asked])
        self.result.lengths.append(lengths)
        fed = 0
        for r, length in zip(asked, lengths, strict=True):
            r.drafted, r.pending = length, r.pending + r.committed
            if length:
                fed, r.pending = fed + r.pending, 0
        if not fed:
            return 0.0
        seconds = truth.draft(fed, lengths)
        cold = COLD if self.drafts < self.trace.cold else 1.0
        self.drafts += 1
        self.policy.observe_draft(len(asked), max(lengths), self.timed(seconds) * cold)
        return seconds

    def timed(self, seconds: float) -> float:
        """The time as observed: with noise, and sometimes far too long."""
        slow = 3.0 if self.rng.random() < self.trace.outliers else 1.0
        return seconds * slow * self.rng.uniform(1 - self.trace.noise, 1 + self.trace.noise)


def serve(trace: Trace, policy: Policy, seed: int = 0) -> Result:
    """Serve all requests of a trace."""
    return Server(trace, policy, seed).run()


def drawn(rng: random.Random, tokens: int, chances: Callable[[int], Sequence[float]]) -> Run:
    """Random runs of a request whose draft j after t tokens is right with chance chances(t)[j]."""
    runs = []
    for t in range(tokens):
        row = chances(t)
        runs.append(next((j for j, p in enumerate(row) if rng.random() >= p), len(row)))
    return runs
