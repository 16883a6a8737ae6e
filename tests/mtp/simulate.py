"""A server in miniature: requests with known acceptance, costs with known truth, timings that lie.

Acceptance is fixed beforehand: `runs[t]` is how many drafts are right after t tokens of a request,
so that every policy meets the same requests. Time is the true cost; noise is only what is observed.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen3next_plugin.mtp.schedule import Policy

Run = Sequence[int]


@dataclass(frozen=True)
class Truth:
    """Seconds, in any unit: a + b·requests + c·tokens + d·distinct experts."""

    fixed: float
    request: float = 0.0
    token: float = 0.0
    expert: float = 0.0
    experts: int = 512
    per_token: int = 10
    first: float = 0.0  # of a drafting pass
    further: float = 0.0
    draft_request: float = 0.0
    lag: float = 0.0  # a token that the drafter has to catch up with

    def step(self, batch: int, tokens: int) -> float:
        touched = self.experts * (1 - (1 - self.per_token / self.experts) ** tokens)
        return self.fixed + self.request * batch + self.token * tokens + self.expert * touched

    def draft(self, lengths: Sequence[int], lag: int) -> float:
        seconds = self.lag * lag if any(lengths) else 0.0
        for j in range(max(lengths)):
            rows = sum(length > j for length in lengths)
            seconds += (self.further if j else self.first) + self.draft_request * rows
        return seconds


@dataclass
class Trace:
    """Requests served in order, `concurrency(tokens done)` of them at a time."""

    runs: list[Run]
    truth: Callable[[int], Truth]  # by step
    concurrency: Callable[[int], int]
    noise: float = 0.2
    outliers: float = 0.03


@dataclass
class Result:
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    lengths: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Request:
    name: str
    runs: Run
    done: int = 0
    lag: int = 1


def serve(trace: Trace, policy: Policy, seed: int = 0) -> Result:
    """Serve all requests of a trace; tokens per second is what counts."""
    rng = random.Random(seed)
    result, waiting, active, drafted = Result(), list(enumerate(trace.runs)), [], []

    def timed(seconds: float) -> float:
        slow = 3.0 if rng.random() < trace.outliers else 1.0
        return seconds * slow * rng.uniform(1 - trace.noise, 1 + trace.noise)

    while waiting or active:
        while waiting and len(active) < trace.concurrency(result.tokens):
            number, runs = waiting.pop(0)
            active.append(Request(f"r{number}", runs))
            drafted.append(0)
        truth, B, T = trace.truth(result.steps), len(active), len(active) + sum(drafted)
        seconds = truth.step(B, T)
        policy.observe_step(B, T, timed(seconds))
        for request, length in zip(active, drafted, strict=True):
            accepted = min(length, request.runs[request.done])
            policy.observe_verify(request.name, length, accepted)
            tokens = min(1 + accepted, len(request.runs) - request.done)
            request.done += tokens
            request.lag += tokens
            result.tokens += tokens
        for request in active:
            if request.done == len(request.runs):
                policy.forget(request.name)
        active = [r for r in active if r.done < len(r.runs)]
        drafted = policy.lengths([r.name for r in active])
        if any(drafted):
            lag = sum(r.lag for r, n in zip(active, drafted, strict=True) if n)
            draft = truth.draft(drafted, lag)
            policy.observe_draft(len(active), max(drafted), timed(draft))
            seconds += draft
            for request, length in zip(active, drafted, strict=True):
                request.lag = 0 if length else request.lag
        result.seconds += seconds
        result.steps += 1
        result.lengths.append(list(drafted))
    return result


def drawn(rng: random.Random, tokens: int, chances: Callable[[int], Sequence[float]]) -> Run:
    """Runs of a request whose draft j after t tokens is right with chances(t)[j]."""
    runs = []
    for t in range(tokens):
        row = chances(t)
        runs.append(next((j for j, p in enumerate(row) if rng.random() >= p), len(row)))
    return runs
