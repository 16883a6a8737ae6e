"""Sampled with drafts, chains and trees: the distribution is the model's, or keeps a grammar."""

from collections.abc import Iterator

import pytest
import torch

from checkpoints import SHIPPED, random_prompt
from engines.distribution import FALSE_ALARM, after_prompt, binned, by_rank, p_value
from engines.sglang.schema import TERSE, follow_a_schema
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from reference import Reference

pytestmark = pytest.mark.serve

PROMPT = random_prompt(9, seed=6)
SAMPLES, TOKENS = 1200, 6
FLAGS = ("--dtype", "float32", "--max-total-tokens", "4000", "--random-seed", "6", *NEXTN, "3")
TREE = ("--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "6")


@pytest.fixture(scope="module", params=[(), TREE], ids=["chain", "tree"])
def server(request) -> Iterator[Server]:
    server = Forked(SHIPPED, *FLAGS, TERSE, *request.param, env=FIXED).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def samples(server) -> torch.Tensor:
    """[SAMPLES, TOKENS] sampled continuations of one prompt."""
    params = {"temperature": 1, "max_new_tokens": TOKENS, "ignore_eos": True}
    prompts = [list(PROMPT)] * SAMPLES
    answers = server.post("/generate", input_ids=prompts, sampling_params=params)
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert accepted > 0.1 * SAMPLES  # else the test would not see what it is for
    return torch.tensor([answer["output_ids"] for answer in answers])


@pytest.fixture(scope="module")
def model() -> Reference:
    return Reference(SHIPPED)


@pytest.fixture(scope="module")
def distributions(samples, model) -> torch.Tensor:
    """The model's own probabilities [SAMPLES, TOKENS, vocab], each sample's prefix given."""
    return after_prompt(model, PROMPT, samples)[:, :-1]


@pytest.fixture(scope="module")
def marginal(model) -> torch.Tensor:
    """The model's probabilities [vocab] of the second token, summed over all first tokens."""
    first = torch.arange(model.trunk.config.vocab_size)
    both = after_prompt(model, PROMPT, first[:, None])  # [vocab, 2, vocab]
    return both[0, 0].double() @ both[:, 1].double()


def test_second_token_whatever_the_first(samples, marginal):
    """The first that a draft can be accepted for."""
    assert p_value(*binned(samples[:, 1], marginal)) > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_a_json_schema(server, temperature):
    """Each draft is held against the grammar at its own place in the answer."""
    assert follow_a_schema(server, temperature) > 0


@pytest.mark.parametrize("position", range(TOKENS))
def test_every_token_given_those_before_it(samples, distributions, position):
    assert p_value(*by_rank(samples[:, position], distributions[:, position])) > FALSE_ALARM
