"""The clients' benchmark: its model does what it says, and its clock counts what it says."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.block_model import TINY
from benchmarks.chain_model import answer_of, chain_model, known, marked, successors
from benchmarks.mtp.cases import CASES, Name
from benchmarks.mtp.load import Choices, Request, Window, staggered
from reference import Reference

CONFIG = json.loads((TINY / "config.json").read_text()) | {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_experts": 8,
}


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Reference]:
    """Both chain models at a small size, each as one file, because transformers reads one."""
    folder = tmp_path_factory.mktemp("chain")
    found = {}
    for rejected in (False, True):
        model = chain_model(folder, folder / "layers.safetensors", CONFIG, rejected=rejected)
        together = {}
        for file in sorted(model.glob("*.safetensors")):
            together |= load_file(file)
            file.unlink()
        save_file(together, model / "model.safetensors", {"format": "pt"})
        found[model.name] = Reference(model)
    return found


def prompt(length: int) -> tuple[int, ...]:
    chance = torch.Generator().manual_seed(length)
    return tuple(torch.randint(known(CONFIG), (length,), generator=chance).tolist())


@pytest.mark.parametrize("length", [1, 70])
def test_an_answer_is_a_chain(references, length):
    greedy = references["accepted"].greedy(prompt(length), 40)
    assert [str(token) for token in greedy] == answer_of(CONFIG, prompt(length), 40)


def test_successors_form_one_cycle():
    after, seen, token = successors(CONFIG).tolist(), set(), 0
    while token not in seen:
        seen.add(token)
        token = after[token]
    assert seen == set(range(known(CONFIG)))


def test_drafts_are_right_but_after_marked_tokens(references):
    reference = references["accepted"]
    wrong, after = set(marked(CONFIG).tolist()), successors(CONFIG).tolist()
    for seed in range(1, 60):
        ids = prompt(seed)
        drafts = reference.mtp.drafts(ids, reference.hidden(ids[:-1]), 3) if seed > 1 else []
        for before, draft in itertools.pairwise((ids[-1], *drafts)):
            assert (draft == after[before]) == (before not in wrong)


@pytest.mark.parametrize(("model", "least", "most"), [("accepted", 1.5, 2.4), ("rejected", 0, 0.1)])
def test_share_of_accepted_drafts(references, model, least, most):
    reference = references[model]
    made, accepted = reference.accepted(prompt(5), reference.greedy(prompt(5), 120), 3)
    assert least <= accepted / (made / 3) <= most


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def serve(window: Window, clock: Clock, *, every: float, tokens: int, answer: int) -> None:
    """Let all clients receive tokens at the same moments, prompts of one such time between."""
    waiting, chunks = True, 0
    while not window.closed:
        clock.seconds += every
        for client in range(window.clients):
            window.arrive(client, 1 if waiting else tokens, first=waiting)
        chunks, waiting = chunks + 1, False
        if chunks % answer == 0:
            waiting = True
            for client in range(window.clients):
                window.finish(client)


@pytest.mark.parametrize("clients", [1, 7])
@pytest.mark.parametrize("seconds", [3, 3.5, 3.99, 4])
def test_clients_in_step_are_counted_to_the_end(clients, seconds):
    clock = Clock()
    window = Window(clients, seconds, whole=False, now=clock)
    serve(window, clock, every=0.5, tokens=8, answer=100)
    assert window.rate == pytest.approx(clients * 8 / 0.5)


@pytest.mark.parametrize("seconds", [0.1, 5, 9])
def test_the_clock_of_one_client_is_of_whole_answers(seconds):
    clock = Clock()
    window = Window(1, seconds, whole=True, now=clock)
    serve(window, clock, every=0.5, tokens=8, answer=4)
    assert window.rate == pytest.approx((1 + 3 * 8) / (4 * 0.5))


def test_the_clock_starts_when_all_clients_have_a_token():
    clock = Clock()
    window = Window(2, 2, whole=False, now=clock)
    for seconds, client, first in ((0, 0, True), (4, 0, False), (5, 1, True), (9, 0, False)):
        clock.seconds = seconds
        window.arrive(client, 10, first=first)
    assert (window.begin, window.end, window.tokens) == (5, 7, 4)  # of 10 in 4 to 9
    assert not window.closed
    window.finish(1)
    assert window.closed


def test_first_answers_are_staggered():
    requests = staggered(itertools.repeat(Request("", 256)), 4)
    assert [next(requests).tokens for _ in range(6)] == [64, 128, 192, 256, 256, 256]


@pytest.mark.parametrize("name", Name, ids=lambda name: name.value)
def test_both_servers_get_the_same_requests(name):
    case = CASES[name]
    one, two, other = (case.requests(CONFIG, 4, seed) for seed in ("1", "1", "2"))
    batch = list(itertools.islice(one, 12))
    assert batch == list(itertools.islice(two, 12))
    assert batch != list(itertools.islice(other, 12))
    for request in batch[4:]:
        assert case.answer[0] <= request.tokens <= case.answer[1]
        assert case.prompt[0] <= len(request.prompt) <= case.prompt[1]


def test_answers_may_differ_only_from_a_near_tie_on():
    off = Choices(["a", "b", "c"], [{"a": -0.1, "x": -3.0}, {"b": -0.7, "y": -0.75}, {"c": -1.0}])

    def gap(*tokens: str) -> float:
        return off.gap_to(Choices([*tokens], []))

    assert gap("a", "b", "c") == 0
    assert gap("a", "y", "z") == pytest.approx(0.05)
    assert gap("x", "b", "c") == pytest.approx(2.9)
    assert gap("a", "z", "c") == gap("a", "b") == math.inf
