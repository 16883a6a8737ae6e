"""The test of sampled tokens can fail."""

import torch

from engines.distribution import FALSE_ALARM, SAMPLES, binned, p_value

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
