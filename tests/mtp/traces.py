"""Traces that a policy must do well on: machines, texts, and numbers of concurrent requests."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from simulate import Run, Trace, Truth, drawn

K = 4  # drafts at most
RECORDED = Path(__file__).with_name("recorded_runs.json")

# Machines, in milliseconds. The block model of docs/performance.md.
BLOCK = Truth(
    fixed=31.0,
    request=0.2,
    token=0.5,
    expert=0.87,
    prompt_token=0.6,
    experts=64,
    layer=3.0,
    head=2.4,
    draft_token=0.15,
    draft_expert=0.22,
)
# The released model on four H100: 184 tokens a second at one request, 590 at four.
GPU = Truth(
    fixed=4.8,
    request=0.01,
    token=0.015,
    expert=0.045,
    prompt_token=0.02,
    layer=0.2,
    head=0.15,
    draft_token=0.0005,
    draft_expert=0.001,
)
# Nearly all of a step is experts: a verify of two tokens reads almost twice as many.
MOE = replace(GPU, fixed=1.0, expert=0.4, draft_expert=0.005)
# A dense model on a machine with spare arithmetic.
CHEAP = Truth(
    fixed=10.0, token=0.05, prompt_token=0.05, experts=0, layer=0.1, head=0.1, draft_token=0.002
)
# A pass takes longer than a step.
DEAR = replace(BLOCK, layer=20.0, head=31.0)

# Chances that draft j is accepted, given those before it.
HIGH = (0.93, 0.91, 0.90, 0.88)
MIDDLE = (0.84, 0.71, 0.63, 0.58)
LOW = (0.30, 0.20, 0.20, 0.20)

TOKENS = {1: 3000, 4: 8000, 16: 20_000, 0: 12_000}  # of a trace, by number of concurrent requests


def slower(truth: Truth, factor: float) -> Truth:
    """Everything takes `factor` times as long."""
    counts = ("experts", "per_token")
    times = {f.name: getattr(truth, f.name) for f in fields(truth) if f.name not in counts}
    return replace(truth, **{name: factor * seconds for name, seconds in times.items()})


def drafting(truth: Truth, factor: float) -> Truth:
    """Drafting passes take `factor` times as long, steps as long as they did."""
    names = ("layer", "head", "draft_token", "draft_expert")
    return replace(truth, **{name: factor * getattr(truth, name) for name in names})


# Chances by the request's number, its progress, and the trace's progress when it started.
Text = Callable[[int, float, float], Sequence[float]]


def steady(*kinds: Sequence[float]) -> Text:
    """Requests of the given kinds in turn."""
    return lambda number, within, begun: kinds[number % len(kinds)]


def turning(*phases: Sequence[float]) -> Text:
    """Each request goes through all phases."""
    return lambda number, within, begun: phases[int(within * len(phases))]


def followed_by(*phases: Sequence[float]) -> Text:
    """Requests of the first phase come first, those of the last phase last."""
    return lambda number, within, begun: phases[int(begun * len(phases))]


@dataclass(frozen=True)
class Case:
    """A trace for any number of concurrent requests."""

    machine: Truth
    text: Text
    becomes: Truth | None = None  # the machine in the second half
    tokens: tuple[int, int] = (150, 600)  # of a request
    noise: float = 0.2
    outliers: float = 0.03
    cold: int = 0  # first timings of drafts that are three times too long

    def trace(self, batch: int, seed: int = 0) -> Trace:
        """`batch` concurrent requests; 0: a number that changes, from 1 to 16."""
        rng, total, done = random.Random(seed), TOKENS[batch], 0
        runs: list[Run] = []
        while done < total:
            tokens = rng.randint(*self.tokens)
            runs.append(self._run(rng, len(runs), tokens, done / total))
            done += tokens
        return Trace(
            runs,
            lambda tokens: self.becomes if self.becomes and 2 * tokens > total else self.machine,
            crowd(batch, total),
            noise=self.noise,
            outliers=self.outliers,
            cold=self.cold,
        )

    def _run(self, rng: random.Random, number: int, tokens: int, begun: float) -> Run:
        return drawn(rng, tokens, lambda t: self.text(number, t / tokens, begun))


def crowd(batch: int, total: int) -> Callable[[int], int]:
    """Number of concurrent requests: `batch`, or for 0 one that changes."""
    if batch:
        return lambda tokens: batch
    levels = (1, 8, 16, 3, 12, 2)
    return lambda tokens: levels[min(len(levels) - 1, len(levels) * tokens // total)]


CASES = {
    "high acceptance": Case(BLOCK, steady(HIGH)),
    "high acceptance, GPU": Case(GPU, steady(HIGH)),
    "middling acceptance": Case(BLOCK, steady(MIDDLE)),
    "middling acceptance, GPU": Case(GPU, steady(MIDDLE)),
    "low acceptance": Case(BLOCK, steady(LOW)),
    "low acceptance, GPU": Case(GPU, steady(LOW)),
    "collapses in each request": Case(GPU, turning(HIGH, LOW), tokens=(800, 1200)),
    "collapses for good": Case(GPU, followed_by(HIGH, LOW)),
    "recovers in each request": Case(GPU, turning(LOW, HIGH), tokens=(800, 1200)),
    "recovers for good": Case(BLOCK, followed_by(LOW, HIGH)),
    "two kinds": Case(GPU, steady(HIGH, LOW)),
    "cheap drafts": Case(CHEAP, steady(MIDDLE)),
    "dear drafts": Case(DEAR, steady(MIDDLE)),
    "many experts": Case(MOE, steady(MIDDLE)),
    "noise": Case(GPU, steady(MIDDLE), noise=0.5, outliers=0.1),
    "the machine gets slower": Case(GPU, steady(MIDDLE), becomes=slower(GPU, 3.0)),
    "the machine gets faster": Case(BLOCK, steady(HIGH), becomes=slower(BLOCK, 0.5)),
    "drafts get dear": Case(GPU, steady(MIDDLE), becomes=replace(GPU, layer=2.0, head=1.0)),
    "short requests": Case(GPU, steady(HIGH), tokens=(5, 25)),
    "short requests, low acceptance": Case(BLOCK, steady(LOW), tokens=(5, 25)),
    "cold start, high acceptance": Case(BLOCK, steady(HIGH), cold=40),
    "cold start, middling acceptance": Case(BLOCK, steady(MIDDLE), cold=40),
    "cold start, GPU": Case(GPU, steady(MIDDLE), cold=40),
    "cheaper drafts than guessed": Case(drafting(GPU, 0.1), steady(HIGH)),
    "dearer drafts than guessed": Case(drafting(BLOCK, 5), steady(LOW)),
}


def recorded(kind: str) -> list[Run]:
    """Runs of the shipped checkpoint, recorded by examples/train_tiny/record.py."""
    kinds: dict[str, list[str]] = json.loads(RECORDED.read_text())
    texts = (
        kinds[kind]
        if kind != "all"
        else [t for group in zip(*kinds.values(), strict=True) for t in group]
    )
    return [[int(digit) for digit in text] for text in texts]


def replayed(kind: str, machine: Truth, batch: int) -> Trace:
    """The recorded requests, repeated to the length of a trace, `batch` at a time."""
    runs, texts = list[Run](), recorded(kind)
    while sum(map(len, runs)) < TOKENS[batch]:
        runs.append(texts[len(runs) % len(texts)])
    return Trace(runs, lambda tokens: machine, crowd(batch, TOKENS[batch]))
