"""The watch on acceptance: a broken checkpoint is reported, a hard text is not."""

import random
from collections.abc import Sequence
from math import comb

import pytest
from simulate import Trace, Truth, drawn, serve
from test_metrics import row
from traces import BLOCK, GPU

from qwen3next_plugin.mtp.costs import Costs
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.policy import Adaptive, Fixed
from qwen3next_plugin.mtp.watch import FEW, MORE, NONE, VERIFIED, Watch


def test_reported_once_with_the_cause():
    said: list[str] = []
    observer = Observer(Fixed(3), None, said.append)
    wrong = [row(str(i % 4), 3) for i in range(NONE)]
    observer.observe_step([*wrong[1:], *[row("b", 0)] * 300], 1.0)
    assert not said  # one draft less, and rows that drafted nothing
    observer.observe_step(wrong * 10, 1.0)
    assert len(said) == 1
    assert f"MTP: 0 of the first {NONE} drafts" in said[0]
    assert "Likely the checkpoint's mtp.* weights are lost" in said[0]


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("accepted", range(FEW + 2))
def test_each_accepted_draft_asks_for_more_rejected_ones(accepted, requests):
    said: list[str] = []
    watch = Watch(said.append)
    for i in range(1000):
        watch.see(str(i % requests), 3, int(i < accepted))
    if accepted > FEW:
        assert not said
        return
    needed = VERIFIED if requests == 1 else NONE + MORE * accepted
    assert [f"{accepted} of the first {needed} drafts" in text for text in said] == [True]


@pytest.mark.parametrize(("chance", "reported"), [(0.3, 1e-7), (0.15, 1e-3)])
def test_the_chance_of_a_false_report(chance, reported):
    """At most that of too few accepted drafts at any of the numbers at which the watch reports."""
    bound = 0.0
    for few in range(FEW + 1):
        n = NONE + MORE * few
        tail = (comb(n, a) * chance**a * (1 - chance) ** (n - a) for a in range(few + 1))
        bound += sum(tail)
    assert bound < reported


class Watched(Adaptive):
    """Adaptive lengths, and a watch on what they verify."""

    def __init__(self, num_drafts: int) -> None:
        super().__init__(num_drafts, Costs())
        self.said: list[str] = []
        self.watch, self.seen = Watch(self.said.append), 0

    def observe_verify(self, request: str, drafted: int, accepted: int, steps: int = 1) -> None:
        super().observe_verify(request, drafted, accepted, steps)
        self.watch.see(request, drafted, accepted)
        self.seen += drafted > 0


def watched(truth: Truth, batch: int, chances: Sequence[float], tokens: int) -> Watched:
    """A policy that has served requests of 400 tokens, so many tokens in all."""
    rng, policy = random.Random(batch), Watched(len(chances))
    runs = [drawn(rng, 400, lambda t: chances) for _ in range(tokens // 400)]
    serve(Trace(runs, lambda t: truth, lambda t: batch), policy)
    return policy


MACHINES = pytest.mark.parametrize("truth", [BLOCK, GPU], ids=["block", "gpu"])


@MACHINES
@pytest.mark.parametrize("batch", [1, 16])
def test_adaptive_lengths_draft_enough_for_a_report(truth, batch):
    """No draft is right: found before 200 are made, which takes several times as long."""
    policy = watched(truth, batch, (0.0, 0.0, 0.0), 9000 + 3000 * batch)
    assert len(policy.said) == 1


@MACHINES
@pytest.mark.parametrize("batch", [1, 16])
def test_no_report_of_a_hard_text(truth, batch):
    policy = watched(truth, batch, (0.2, 0.1, 0.1), 4000)
    assert policy.seen > FEW
    assert not policy.said
