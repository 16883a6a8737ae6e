"""Penalties count every token of an answer, in whatever numbers steps commit them."""

import random
from collections.abc import Iterator
from types import SimpleNamespace as Bag

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)

from qwen3next_plugin.engines.sglang.repairs.penalties import count_every_token

V, EOS = 11, 10
PENALIZERS = {
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
}
PARAMS = [
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.25, "min_new_tokens": 5},
    {"repetition_penalty": 1.5, "frequency_penalty": -0.5},
    {"min_new_tokens": 12},
    {},
]
NEUTRAL = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop_token_ids": None,
}


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """The host compiles one of its functions, which takes longer than all tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Request(Bag):
    """What penalizers read of a request."""

    __hash__ = object.__hash__

    def __init__(self, **params):
        super().__init__(
            sampling_params=Bag(**(NEUTRAL | params)),
            output_ids=[],
            retraction_count=0,
            eos_token_ids={EOS},
            tokenizer=Bag(additional_stop_token_ids=None, eos_token_id=EOS),
        )


class Batch:
    """A running batch of requests, with or without drafts."""

    def __init__(self, reqs, drafts=True):
        self.reqs, self.device = list(reqs), "cpu"
        self.spec_info = Bag() if drafts else None
        orchestrator = BatchedPenalizerOrchestrator(V, self, PENALIZERS)
        self.sampling_info = Bag(penalizer_orchestrator=orchestrator)

    def merge(self, other):
        ours, theirs = (b.sampling_info.penalizer_orchestrator for b in (self, other))
        ours.merge(theirs)
        self.reqs += other.reqs

    def count(self):
        count_every_token(host, self)

    def logits(self):
        """What penalties make of flat logits, as of a step's."""
        logits = torch.full((len(self.reqs), V), 2.0)
        self.sampling_info.penalizer_orchestrator.apply(logits, repeat=1)
        return logits


def host(batch):
    """The host's own, for a step of one token a request."""
    last = torch.tensor([request.output_ids[-1] for request in batch.reqs])
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(last)


def expected(request):
    """The row of a request that decodes its tokens one by one, alone."""
    alone, batch = Request(**vars(request.sampling_params)), None
    for token in request.output_ids:
        alone.output_ids.append(token)
        batch = batch or Batch([alone], drafts=False)
        batch.count()
    return batch.logits()[0]


def check(batch):
    for request, row in zip(batch.reqs, batch.logits(), strict=True):
        assert torch.allclose(row, expected(request), atol=1e-6)


def step(batch, rng, most):
    """A step that commits one to `most` tokens a request."""
    for request in batch.reqs:
        request.output_ids += [rng.randrange(V) for _ in range(rng.randint(1, most))]


@pytest.mark.parametrize("most", [1, 4])
def test_every_token_counts_once(most):
    rng = random.Random(most)
    batch = Batch([Request(**params) for params in PARAMS])
    for _ in range(6):
        step(batch, rng, most)
        batch.count()
        check(batch)


def test_requests_that_come_and_go():
    """Also of one that penalties reach long after its first token."""
    rng = random.Random(3)
    batch = Batch([Request(), Request(**PARAMS[0])])
    for turn in range(8):
        step(batch, rng, 4)
        batch.count()
        check(batch)
        if turn == 3:
            keep = [0]
            batch.sampling_info.penalizer_orchestrator.filter(torch.tensor(keep))
            batch.reqs = [batch.reqs[i] for i in keep]
            late = Batch([Request(**params) for params in PARAMS[1:]])
            step(late, rng, 1)  # its prompt's
            batch.merge(late)
            batch.count()
            check(batch)


def test_a_retraction_makes_the_counts_anew():
    rng = random.Random(5)
    requests = [Request(**params) for params in PARAMS]
    batch = Batch(requests)
    for _ in range(3):
        step(batch, rng, 3)
        batch.count()
    for request in requests:
        request.retraction_count += 1
    again = Batch(requests)
    step(again, rng, 1)  # behind its text, read again
    again.count()
    check(again)


def test_without_drafts_the_host_counts():
    asked = []
    batch = Batch([Request(**PARAMS[0])], drafts=False)
    batch.reqs[0].output_ids += [1, 2, 3]
    count_every_token(asked.append, batch)
    assert asked == [batch]
