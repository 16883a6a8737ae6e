"""Pending tokens: what is kept of requests that skip the MTP layer, and what is given back."""

import torch

from qwen3next_plugin.mtp.pending import Pending, PendingTokens

D = 3


def tokens(first: int, count: int) -> PendingTokens:
    """Pending tokens that differ by position."""
    positions = torch.arange(first, first + count)
    return PendingTokens(first, positions + 1, positions[:, None].float().expand(-1, D).clone())


def same(found: PendingTokens, first: int, count: int) -> bool:
    wanted = tokens(first, count)
    same_ids = torch.equal(found.token_ids, wanted.token_ids)
    return same_ids and torch.equal(found.hidden_states, wanted.hidden_states)


def test_everything_skipped_comes_back_in_order():
    pending = Pending()
    for first, count in ((5, 1), (6, 2), (8, 1)):
        pending.put("a", tokens(first, count))
    assert pending.count("a") == 4
    assert same(pending.take("a", tokens(9, 1)), 5, 5)
    assert pending.count("a") == 0
    assert same(pending.take("a", tokens(10, 1)), 10, 1)


def test_what_is_kept_is_a_copy():
    pending, reused = Pending(), tokens(0, 2)
    pending.put("a", reused)
    reused.token_ids.zero_()
    reused.hidden_states.zero_()
    assert same(pending.take("a", tokens(2, 1)), 0, 3)


def test_a_request_that_resumes_elsewhere_starts_afresh():
    pending = Pending()
    pending.put("a", tokens(5, 2))
    pending.put("a", tokens(20, 1))
    assert pending.count("a") == 1
    assert same(pending.take("a", tokens(30, 1)), 30, 1)


def test_those_that_are_gone_leave_nothing():
    pending = Pending()
    pending.put("a", tokens(0, 1))
    pending.put("b", tokens(0, 3))
    pending.keep_only({"b", "c"})
    assert [pending.count(request) for request in "abc"] == [0, 3, 0]
