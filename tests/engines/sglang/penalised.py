"""Batches of penalised requests, with the host's penalizers."""

from types import SimpleNamespace as Bag

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)

from qwen3next_plugin.engines.sglang.speculation.penalties import count_every_token

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
        self.penalizers = BatchedPenalizerOrchestrator(V, self, PENALIZERS)
        self.sampling_info = Bag(penalizer_orchestrator=self.penalizers)

    def merge(self, other):
        self.penalizers.merge(other.penalizers)
        self.reqs += other.reqs

    def count(self):
        count_every_token(host, self)

    def logits(self):
        """What penalties make of flat logits, as of a step's."""
        logits = torch.full((len(self.reqs), V), 2.0)
        self.penalizers.apply(logits, repeat=1)
        return logits


def host(batch):
    """The host's own, for a step of one token a request."""
    last = torch.tensor([request.output_ids[-1] for request in batch.reqs])
    batch.penalizers.cumulate_output_tokens(last)


def alone(request, drafts=()):
    """A batch of the request alone, which has decoded its tokens and these drafts one by one."""
    twin, batch = Request(**vars(request.sampling_params)), None
    for token in (*request.output_ids, *drafts):
        twin.output_ids.append(token)
        batch = batch or Batch([twin], drafts=False)
        batch.count()
    return batch


def check(batch):
    """Each request's penalties are those that it has alone."""
    for request, row in zip(batch.reqs, batch.logits(), strict=True):
        assert torch.allclose(row, alone(request).logits()[0], atol=1e-6)


def step(batch, rng, most):
    """A step that commits one to `most` tokens a request."""
    for request in batch.reqs:
        request.output_ids += [rng.randrange(V) for _ in range(rng.randint(1, most))]
