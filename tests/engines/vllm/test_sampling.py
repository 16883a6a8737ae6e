"""At temperature 1 a token's distribution is the model's own, drafts or not."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import SHIPPED, VOCAB, random_prompt
from engines.vllm.offline import Offline
from reference import Reference, quietly

pytestmark = pytest.mark.serve

PROMPT = random_prompt(9, seed=6)
SAMPLES, TOKENS = 2000, 6
FALSE_ALARM = 1e-5  # of each chi-square; the seeds are fixed, so a green test stays green


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
    return after_prompt(reference(case[0]), samples)[:, :-1]


@quietly()
def after_prompt(model: Reference, continuations: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, tokens+1, vocab] of each token of N continuations, and of the next."""
    ids = torch.cat([torch.tensor(PROMPT).expand(len(continuations), -1), continuations], dim=1)
    logits = [model.trunk(part, use_cache=False).logits for part in ids.split(500)]
    return torch.cat(logits)[:, len(PROMPT) - 1 :].softmax(-1)


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square test of counts against expected counts."""
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def binned(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observed and expected counts of the tokens expected at least ten times, and of the rest."""
    expected = probabilities * len(tokens)
    observed = torch.tensor([Counter(tokens.tolist())[i] for i in range(len(expected))])
    common = expected >= 10

    def with_rest(counts: torch.Tensor) -> torch.Tensor:
        return torch.cat([counts[common], counts[~common].sum()[None]]).double()

    return with_rest(observed), with_rest(expected)


def test_first_token(samples, distributions):
    assert p_value(*binned(samples[:, 0], distributions[0, 0])) > FALSE_ALARM


def test_second_token_whatever_the_first(samples, distributions, case, reference):
    """The first that a draft can be accepted for; its marginal is summed over all first tokens."""
    first = torch.arange(distributions.shape[-1])
    second = after_prompt(reference(case[0]), first[:, None])[:, -1]
    marginal = distributions[0, 0].double() @ second.double()
    assert p_value(*binned(samples[:, 1], marginal)) > FALSE_ALARM


@pytest.mark.parametrize("position", range(TOKENS))
def test_every_token_given_those_before_it(samples, distributions, position):
    """The probability mass of the likelier tokens is uniform: a rank that drafts would shift."""
    p = distributions[:, position].double()
    chosen = p.gather(1, samples[:, position, None])
    likelier = torch.where(p > chosen, p, 0).sum(-1)
    jitter = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(7))
    mass = likelier + jitter * chosen[:, 0]
    bins = 20
    observed = (mass * bins).long().clamp(0, bins - 1).bincount(minlength=bins)
    expected = torch.full((bins,), SAMPLES / bins, dtype=torch.float64)
    assert p_value(observed.double(), expected) > FALSE_ALARM


def test_the_test_sees_a_bias():
    """A twentieth of the samples moved onto one token is found."""
    p = torch.full((VOCAB,), 0.1 / (VOCAB - 20))
    p[:20] = 0.9 / 20
    tokens = torch.cat([torch.arange(1800) % 20, 20 + torch.arange(200)])
    assert p_value(*binned(tokens, p)) > 0.99
    tokens[:100] = 0
    assert p_value(*binned(tokens, p)) < FALSE_ALARM
