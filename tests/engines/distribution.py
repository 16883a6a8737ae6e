"""Are sampled tokens distributed as the model says? Chi-square tests for both engines."""

from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from checkpoints import random_prompt
from reference import Reference, quietly

PROMPT = random_prompt(9, seed=6)  # the samples' one prompt
TOKENS, SAMPLES = 6, 1200  # of a sample; of them, as many as test_distribution.py needs
FALSE_ALARM = 1e-5  # of each chi-square; the seeds are fixed, so a green test stays green
BINS = 20
LIKELIEST = 3  # tokens that are counted by rank


@quietly()
def after_prompt(
    model: Reference, prompt: Sequence[int], continuations: torch.Tensor
) -> torch.Tensor:
    """Probabilities [N, tokens+1, vocab] of each token of N continuations, and of the next."""
    ids = torch.cat([torch.tensor(prompt).expand(len(continuations), -1), continuations], dim=1)
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    # These are short, and transformers would fill each up to a chunk of 64.
    short = partial(rule, chunk_size=ids.shape[1])
    with patch.object(modeling_qwen3_next, rule.__name__, short):
        run = partial(model.trunk, use_cache=False, logits_to_keep=continuations.shape[1] + 1)
        return torch.cat([run(part).logits.softmax(-1) for part in ids.split(400)])


def check_sampled(model: Reference, samples: torch.Tensor) -> None:
    """Continuations [N, TOKENS] of PROMPT at temperature 1 are distributed as the model's are."""
    assert len(samples) == SAMPLES
    each = after_prompt(model, PROMPT, samples[:, :-1])  # [N, TOKENS, vocab], given its prefix
    assert p_value(*binned(samples[:, 0], each[0, 0])) > FALSE_ALARM, "first token"
    # The first that a draft can be accepted for, whatever the token before it.
    second = each[:, 1].double().mean(0)
    assert p_value(*binned(samples[:, 1], second)) > FALSE_ALARM, "second token"
    for position in range(TOKENS):
        given = by_rank(samples[:, position], each[:, position])
        assert p_value(*given) > FALSE_ALARM, f"position {position}, given those before it"
    pooled = likeliest(samples.flatten(), each.flatten(0, 1))
    assert p_value(*pooled) > FALSE_ALARM, "the likeliest tokens of all positions"


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square test of counts against expected counts."""
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic.double() / 2))


def binned(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Observed and expected counts of the tokens expected at least five times, and of the rest."""
    expected = probabilities * len(tokens)
    observed = tokens.bincount(minlength=len(expected))
    common = expected >= 5
    assert common.sum() > 2, "too few samples"

    def with_rest(counts: torch.Tensor) -> torch.Tensor:
        return torch.cat([counts[common], counts[~common].sum()[None]]).double()

    return with_rest(observed), with_rest(expected)


def by_rank(tokens: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of the mass of likelier tokens: uniform, where a rank that drafts would shift it.

    Shapes: tokens [N], probabilities [N, vocab] of each token's own prefix.
    """
    p = probabilities.double()
    chosen = p.gather(1, tokens[:, None])
    likelier = torch.where(p > chosen, p, 0).sum(-1)
    jitter = torch.rand(len(tokens), generator=torch.Generator().manual_seed(7))
    mass = likelier + jitter * chosen[:, 0]
    observed = (mass * BINS).long().clamp(0, BINS - 1).bincount(minlength=BINS)
    return observed.double(), torch.full((BINS,), len(tokens) / BINS, dtype=torch.float64)


def likeliest(
    tokens: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of each prefix's likeliest tokens, which are what is drafted, and of all others.

    Shapes: tokens [N], probabilities [N, vocab] of each token's own prefix.
    """
    p, ids = probabilities.double().topk(LIKELIEST)

    def with_rest(each: torch.Tensor) -> torch.Tensor:
        counts = each.sum(0).double()
        return torch.cat([counts, len(tokens) - counts.sum()[None]])

    return with_rest(tokens[:, None] == ids), with_rest(p)
