"""At temperature 1 a token's distribution is the model's own, drafts or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import SHIPPED, VOCAB, random_prompt
from engines.distribution import FALSE_ALARM, after_prompt, binned, by_rank, p_value
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

PROMPT = random_prompt(9, seed=6)
SAMPLES, TOKENS = 2000, 6


@pytest.fixture(
    scope="module",
    params=[("random", 0), ("random", 3), ("shipped", 3)],
    ids=["random_plain", "random_mtp-3", "shipped_mtp-3"],
)
def case(request, checkpoint) -> tuple[Path, int]:
    """A checkpoint, and how many tokens are drafted."""
    name, k = request.param
    return (SHIPPED if name == "shipped" else checkpoint), k


@pytest.fixture(scope="module")
def samples(case) -> Iterator[torch.Tensor]:
    """[SAMPLES, TOKENS] sampled continuations of one prompt."""
    checkpoint, k = case
    drafts = {"speculative_config": {"method": "mtp", "num_speculative_tokens": k}} if k else {}
    fixed = {"QWEN3NEXT_DRAFTS": "fixed"}
    engine = Offline(checkpoint, env=fixed, dtype="float32", max_model_len=64, **drafts)
    try:
        (outputs,) = engine.generate([PROMPT], n=SAMPLES, temperature=1.0, max_tokens=TOKENS)
        counters = engine.counters()
    finally:
        engine.close()
    if k:  # else the test would not see what it is for
        assert counters["vllm:spec_decode_num_accepted_tokens"] > 0.1 * SAMPLES
    return torch.tensor([output.token_ids for output in outputs])


@pytest.fixture(scope="module")
def distributions(samples, case, reference) -> torch.Tensor:
    """The model's own probabilities [SAMPLES, TOKENS, vocab], each sample's prefix given."""
    return after_prompt(reference(case[0]), PROMPT, samples)[:, :-1]


def test_first_token(samples, distributions):
    assert p_value(*binned(samples[:, 0], distributions[0, 0])) > FALSE_ALARM


def test_second_token_whatever_the_first(samples, distributions, case, reference):
    """The first that a draft can be accepted for; its marginal is summed over all first tokens."""
    first = torch.arange(distributions.shape[-1])
    second = after_prompt(reference(case[0]), PROMPT, first[:, None])[:, -1]
    marginal = distributions[0, 0].double() @ second.double()
    assert p_value(*binned(samples[:, 1], marginal)) > FALSE_ALARM


@pytest.mark.parametrize("position", range(TOKENS))
def test_every_token_given_those_before_it(samples, distributions, position):
    assert p_value(*by_rank(samples[:, position], distributions[:, position])) > FALSE_ALARM


def test_the_test_sees_a_bias():
    """A twentieth of the samples moved onto one token is found."""
    p = torch.full((VOCAB,), 0.1 / (VOCAB - 20))
    p[:20] = 0.9 / 20
    tokens = torch.cat([torch.arange(1800) % 20, 20 + torch.arange(200)])
    assert p_value(*binned(tokens, p)) > 0.99
    tokens[:100] = 0
    assert p_value(*binned(tokens, p)) < FALSE_ALARM
