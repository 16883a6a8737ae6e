"""The test of sampled tokens can fail, with as many samples as the engines' tests draw."""

import pytest
import torch

from engines.distribution import FALSE_ALARM, SAMPLES, TOKENS, binned, likeliest, p_value

V = 512


def test_a_bias_is_seen():
    """A twentieth of the samples moved onto one token is found."""
    p = torch.full((V,), 0.1 / (V - 20))
    p[:20] = 0.9 / 20
    likely, others = SAMPLES * 9 // 10, SAMPLES // 10
    tokens = torch.cat([torch.arange(likely) % 20, 20 + torch.arange(others)])
    assert p_value(*binned(tokens, p)) > 0.99
    tokens[: SAMPLES // 20] = 0
    assert p_value(*binned(tokens, p)) < FALSE_ALARM


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_bias_towards_drafts_is_seen(seed, rank):
    """A twentieth of all tokens are the likeliest one, or the second, whatever was sampled."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(SAMPLES * TOKENS, V, generator=generator)).softmax(-1)
    tokens = p.multinomial(1, generator=generator)[:, 0]
    assert p_value(*likeliest(tokens, p)) > FALSE_ALARM
    tokens[::20] = p[::20].topk(2).indices[:, rank]
    assert p_value(*likeliest(tokens, p)) < FALSE_ALARM
