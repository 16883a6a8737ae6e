"""Penalties count every token of an answer, in whatever numbers steps commit them."""

import random
from collections.abc import Iterator

import pytest
import torch

from engines.sglang.penalised import PARAMS, Batch, Request, V, check, step
from qwen3next_plugin.engines.sglang.speculation.penalties import (
    count_every_token,
    count_what_is_read_again,
    count_what_is_there_already,
)


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """The host compiles one of its functions, which takes longer than all tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield


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
            batch.penalizers.filter(torch.tensor(keep))
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


@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_that_is_read_again_counts_before_the_next_token(drafts):
    rng = random.Random(7)
    requests = [Request(**params) for params in PARAMS]
    batch = Batch(requests, drafts=drafts)
    for _ in range(6):
        step(batch, rng, 3 if drafts else 1)
        batch.count()
    for request in requests:
        request.retraction_count += 1
    again = Batch(requests, drafts=drafts)
    count_what_is_read_again(lambda _: None, again)
    check(again)
    for _ in range(3):
        step(again, rng, 1)
        again.count()
        check(again)


@pytest.mark.parametrize("drafts", [False, True])
def test_an_answer_that_a_decode_server_has_put_back_counts(drafts):
    """All but the last token, which the next step reads; also of a first token from elsewhere."""
    rng = random.Random(8)
    requests = [Request(**params) for params in PARAMS]
    step(Batch(requests), rng, 1)
    for length in (0, 5):
        for request in requests:
            request.output_ids += [rng.randrange(V) for _ in range(length)]
        batch = Batch(requests, drafts=drafts)
        count_what_is_there_already(lambda _: None, batch)
        for _ in range(3):
            batch.count()
            check(batch)
            step(batch, rng, 3 if drafts else 1)
        for request in requests:
            request.retraction_count += 1


def test_without_drafts_the_host_counts():
    asked = []
    batch = Batch([Request(**PARAMS[0])], drafts=False)
    batch.reqs[0].output_ids += [1, 2, 3]
    count_every_token(asked.append, batch)
    assert asked == [batch]
