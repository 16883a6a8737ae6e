"""Plain steps: collected steps without drafts are kept as they were, and seen to end."""

import torch

from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.plain_steps import EVERY, PlainSteps, wait_after
from qwen3next_plugin.mtp.policy import Fixed

FIRSTS = {"a": 7, "b": 40, "c": 3}


def collected(count: int) -> PlainSteps:
    """Steps whose hidden states are their positions."""
    observer = Observer(Fixed(0), Board(3))
    plain = PlainSteps([*FIRSTS], [*FIRSTS.values()], observer, Pending())
    for n in range(count):
        positions = torch.tensor([*FIRSTS.values()]) + n
        assert plain.continued_by([*FIRSTS], positions.tolist())
        plain.add(positions + 1, positions[:, None].float().expand(-1, 5), 0.1)
    return plain


def test_another_batch_does_not_continue_them():
    plain = collected(2)
    assert plain.continued_by(["a", "b", "c"], [9, 42, 5])
    assert not plain.continued_by(["a", "c", "b"], [9, 42, 5])
    assert not plain.continued_by(["a", "b"], [9, 42])
    assert not plain.continued_by(["a", "b", "c"], [9, 41, 5])


def counts(plain: PlainSteps) -> tuple[float, float]:
    """Steps reported, and times that a request skipped the MTP layer."""
    board = plain.observer.board
    return board.read("steps")["plain"], board.read("drafts_skipped")[""]


def test_the_last_step_drafts_and_the_others_are_kept():
    plain = collected(4)
    rows = plain.look(lambda requests, more: [more, 0, 1])
    assert [row.draft for row in rows] == [3, 0, 1]
    assert len(plain) == 0
    assert plain.continued_by([*FIRSTS], [11, 44, 7])
    assert counts(plain) == (4, 3 * 3)
    for row, first in zip(rows, FIRSTS.values(), strict=True):
        assert plain.pending.count(row.request) == 3
        fed = plain.pending.take(row, 100)
        assert fed is not None
        assert fed.first == first
        assert fed.token_ids.tolist() == [first + 1 + n for n in range(4)]
        assert fed.hidden_states[:, 0].tolist() == [first + n for n in range(4)]


def test_all_are_kept_where_none_drafts():
    plain = collected(3)
    assert plain.look(lambda requests, more: [0] * len(requests)) == []
    plain.keep()
    assert plain.pending.count("a") == 3
    assert plain.continued_by([*FIRSTS], [10, 43, 6])
    assert counts(plain) == (3, 3 * 3)


def test_kept_steps_are_reported_once_and_continued():
    plain = collected(3)
    plain.keep()
    plain.keep()
    assert plain.pending.count("a") == 3
    assert plain.continued_by([*FIRSTS], [10, 43, 6])
    assert counts(plain) == (3, 3 * 3)


def test_few_are_collected_at_first():
    assert [wait_after(idle) for idle in (1, 3, 7, 8, 12)] == [1, 1, 1, 2, 3]
    assert wait_after(10**6) == EVERY
