"""Pending tokens: what is kept of requests that skip the MTP layer, and what is given back."""

import pytest
import torch

from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.rows import Row, Tokens

D = 3
BYTES = 8 + 4 * D  # of one token here


def tokens(first: int, count: int) -> Tokens:
    """Pending tokens that differ by position."""
    positions = torch.arange(first, first + count)
    return Tokens(first, positions + 1, positions[:, None].float().expand(-1, D).clone())


def row(request: str, first: int, count: int) -> Row:
    """A step's row with such tokens."""
    return Row(
        request=request, index=0, tokens=tokens(first, count), scheduled=count, continues=True
    )


def same(found: Tokens | None, first: int, count: int) -> bool:
    wanted = tokens(first, count)
    return (
        found is not None
        and found.first == first
        and torch.equal(found.token_ids, wanted.token_ids)
        and torch.equal(found.hidden_states, wanted.hidden_states)
    )


def steps(firsts: dict[str, int], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids and hidden states of steps that have one token of each request."""
    parts = [[tokens(first + n, 1) for first in firsts.values()] for n in range(count)]
    ids = [torch.cat([part.token_ids for part in step]) for step in parts]
    return ids, [torch.cat([part.hidden_states for part in step]) for step in parts]


def test_everything_skipped_comes_back_in_order():
    pending = Pending()
    for first, count in ((5, 1), (6, 2), (8, 1)):
        pending.put([row("a", first, count), row("b", 10 * first, 3)])
    assert pending.count("a") == 4
    assert same(pending.take(row("a", 9, 1), 100), 5, 5)
    assert pending.count("a") == 0
    assert same(pending.take(row("a", 10, 1), 100), 10, 1)
    assert same(pending.take(row("b", 83, 1), 100), 80, 4)


def test_what_is_kept_is_a_copy():
    pending, reused = Pending(), row("a", 0, 2)
    pending.put([reused])
    reused.tokens.token_ids.zero_()
    reused.tokens.hidden_states.zero_()
    assert same(pending.take(row("a", 2, 1), 100), 0, 3)


def test_a_long_backlog_is_read_in_slices():
    pending = Pending()
    pending.put([row("a", 0, 10)])
    counts = []
    for first, last in ((10, 4), (11, 8), (12, 12)):
        assert same(pending.take(row("a", first, 1), 4), last - 4, 4)
        counts.append(pending.count("a"))
    assert counts == [7, 4, 1]
    assert same(pending.take(row("a", 13, 1), 4), 12, 2)
    assert pending.count("a") == 0


def test_a_step_longer_than_a_slice():
    pending = Pending()
    assert same(pending.take(row("a", 0, 5), 3), 0, 3)
    assert pending.count("a") == 2
    assert same(pending.take(row("a", 5, 1), 3), 3, 3)


def test_a_request_that_resumes_elsewhere_starts_afresh():
    pending = Pending()
    pending.put([row("a", 5, 2)])
    pending.put([row("a", 20, 1)])
    assert pending.count("a") == 1
    assert same(pending.take(row("a", 30, 1), 100), 30, 1)


def test_those_that_are_gone_leave_nothing():
    pending = Pending()
    pending.put([row("a", 0, 1), row("b", 0, 3)])
    pending.keep_only({"b", "c"})
    assert [pending.count(request) for request in "abc"] == [0, 3, 0]


@pytest.mark.parametrize("by", ["put", "take"])
def test_what_does_not_fit_is_lost_alone(by):
    pending = Pending(max_bytes=6 * BYTES)
    pending.put([row("a", 0, 3), row("b", 0, 2)])
    if by == "put":
        pending.put([row("a", 3, 2)])
    else:
        assert pending.take(row("a", 3, 2), 100) is None
    assert pending.lost("a")
    assert pending.count("a") == 0
    pending.put([row("a", 5, 1), row("b", 2, 4)])  # the others have its room
    assert (pending.count("a"), pending.count("b")) == (0, 6)
    assert pending.take(row("a", 6, 1), 100) is None
    assert pending.take(row("b", 6, 1), 100) is None  # no room for a seventh
    assert pending.lost("b")


def test_a_lost_request_drafts_again_where_it_is_read_anew():
    pending = Pending(max_bytes=2 * BYTES)
    pending.put([row("a", 0, 3)])
    assert pending.lost("a")
    pending.put([row("a", 1, 1)])  # after a preemption, from a cached prefix
    assert not pending.lost("a")
    assert same(pending.take(row("a", 2, 1), 100), 1, 2)


def test_a_request_is_lost_whose_kv_is_gone():
    pending = Pending()
    pending.put([row("a", 0, 3)])
    pending.lose("a", 7)
    assert (pending.lost("a"), pending.count("a")) == (True, 0)
    pending.put([row("a", 7, 1)])
    assert pending.take(row("a", 8, 1), 100) is None
    pending.put([row("a", 2, 1)])  # it is read anew
    assert not pending.lost("a")


def test_room_is_used_again():
    pending = Pending(max_bytes=4 * BYTES)
    for first in range(0, 40, 4):
        pending.put([row("a", first, 3)])
        assert same(pending.take(row("a", first + 3, 1), 100), first, 4)
    assert not pending.lost("a")


@pytest.mark.parametrize(
    ("fed", "caught_up"), [(tokens(2, 6), 5), (tokens(7, 1), 0), (tokens(2, 3), 3), (None, 0)]
)
def test_caught_up_tokens_are_those_of_earlier_steps(fed, caught_up):
    found = row("a", 7, 1)
    found.fed = fed
    assert found.caught_up == caught_up


def test_steps_are_kept_together_as_one_by_one():
    pending, firsts = Pending(), {"a": 5, "b": 70}
    pending.put([row("b", 68, 2)])
    pending.put_steps(firsts.keys(), firsts.values(), *steps(firsts, 3))
    assert same(pending.take(row("a", 8, 1), 100), 5, 4)
    assert same(pending.take(row("b", 73, 1), 100), 68, 6)


def test_steps_without_room_lose_their_request_only():
    pending = Pending(max_bytes=7 * BYTES)
    pending.put([row("b", 0, 4)])
    pending.put_steps("ab", (9, 4), *steps({"a": 9, "b": 4}, 2))
    assert pending.lost("b")
    assert same(pending.take(row("a", 11, 1), 100), 9, 3)


def test_what_drafts_is_fed_up_to_a_limit():
    pending = Pending()
    pending.put([row("a", 0, 3), row("b", 0, 2)])
    rows = [row("a", 3, 1), row("b", 2, 1), row("c", 0, 1)]
    for each in rows[:2]:
        each.draft = 2
    assert pending.feed(rows, 6) == rows[:2]
    assert same(rows[0].fed, 0, 3)
    assert same(rows[1].fed, 0, 3)
    assert [each.draft for each in rows] == [0, 2, 0]  # a has not caught up: more was pending
    assert [pending.count(each) for each in "abc"] == [1, 0, 1]
    assert pending.feed([row("a", 4, 1), row("c", 1, 1)], 9, every=True) != []
    assert [pending.count(each) for each in "abc"] == [0, 0, 0]
