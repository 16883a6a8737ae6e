"""Plain steps: collected steps without drafts are kept as they were, and seen to end."""

import torch

from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.plain_steps import EVERY, PlainSteps, wait_after

FIRSTS = {"a": 7, "b": 40, "c": 3}


def collected(count: int) -> PlainSteps:
    """Steps whose hidden states are their positions."""
    plain = PlainSteps([*FIRSTS], [*FIRSTS.values()])
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


def test_the_last_step_follows_the_kept_ones():
    pending, plain = Pending(), collected(4)
    rows = plain.take_last()
    plain.keep(pending)
    assert len(plain) == 0
    for row, first in zip(rows, FIRSTS.values(), strict=True):
        assert pending.count(row.request) == 3
        fed = pending.take(row, 100)
        assert fed is not None
        assert fed.first == first
        assert fed.token_ids.tolist() == [first + 1 + n for n in range(4)]
        assert fed.hidden_states[:, 0].tolist() == [first + n for n in range(4)]


def test_kept_steps_are_continued():
    pending, plain = Pending(), collected(3)
    plain.keep(pending)
    plain.keep(pending)
    assert pending.count("a") == 3
    assert plain.continued_by([*FIRSTS], [10, 43, 6])


def test_few_are_collected_at_first():
    assert [wait_after(idle) for idle in (1, 3, 7, 8, 12)] == [1, 1, 1, 2, 3]
    assert wait_after(10**6) == EVERY
