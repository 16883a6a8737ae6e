"""What a request is behind in the MTP layer, and how it catches up."""

import torch

from qwen3next_plugin.mtp.pending import Pending, PendingTokens

D = 3


def rows(first: int, count: int) -> PendingTokens:
    """PendingTokens that can be told apart by their numbers."""
    positions = torch.arange(first, first + count)
    return PendingTokens(first, positions + 1, positions[:, None].float().expand(-1, D).clone())


def same(found: PendingTokens, first: int, count: int) -> bool:
    wanted = rows(first, count)
    tokens = torch.equal(found.token_ids, wanted.token_ids)
    return tokens and torch.equal(found.hidden_states, wanted.hidden_states)


def test_everything_skipped_comes_back_in_order():
    pending = Pending()
    for first, count in ((5, 1), (6, 2), (8, 1)):
        pending.put("a", rows(first, count))
    assert pending.count("a") == 4
    assert same(pending.take("a", rows(9, 1)), 5, 5)
    assert pending.count("a") == 0
    assert same(pending.take("a", rows(10, 1)), 10, 1)


def test_what_is_kept_is_a_copy():
    pending, reused = Pending(), rows(0, 2)
    pending.put("a", reused)
    reused.token_ids.zero_()
    reused.hidden_states.zero_()
    assert same(pending.take("a", rows(2, 1)), 0, 3)


def test_a_request_that_resumes_elsewhere_starts_afresh():
    pending = Pending()
    pending.put("a", rows(5, 2))
    pending.put("a", rows(20, 1))
    assert pending.count("a") == 1
    assert same(pending.take("a", rows(30, 1)), 30, 1)


def test_those_that_are_gone_leave_nothing():
    pending = Pending()
    pending.put("a", rows(0, 1))
    pending.put("b", rows(0, 3))
    pending.keep_only({"b", "c"})
    assert [pending.count(request) for request in "abc"] == [0, 3, 0]
