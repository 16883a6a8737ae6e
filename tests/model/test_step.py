"""Building a step checks its indices, and the error names the row."""

from itertools import pairwise

import pytest
import torch

from qwen3next_plugin.model.step import NULL_SLOT, DeviceSteps, StepError, build_step


def build(
    query_start_loc=(0, 1, 5, 5), seq_lens=(8, 4, 3), slot=(2, 0, 1), num_tokens=5, num_slots=3
):
    return build_step(
        query_start_loc=torch.tensor(query_start_loc),
        seq_lens=torch.tensor(seq_lens),
        slot=torch.tensor(slot),
        num_tokens=num_tokens,
        num_slots=num_slots,
        max_query_len=max(b - a for a, b in pairwise((0, *query_start_loc))),
    )


def test_context_is_what_came_before():
    step = build()
    assert step.context_len.tolist() == [7, 0, 3]
    assert step.num_tokens == 5
    for tensor in (step.query_start_loc, step.slot, step.context_len):
        assert tensor.dtype == torch.int32


def test_ragged_drafts_beside_a_prefill():
    step = build((0, 1, 4, 104, 106), (10, 20, 100, 7), (0, 1, 2, 3), 106, 4)
    assert step.context_len.tolist() == [9, 17, 0, 5]


def test_padding_rows_and_padding_tokens():
    """Rows without a page are not checked: they hold leftovers of other steps."""
    step = build((0, 1, 2, 2), (5, -7, 0), (1, NULL_SLOT, NULL_SLOT), num_tokens=8)
    assert step.slot.tolist() == [1, NULL_SLOT, NULL_SLOT]


def test_no_rows():
    assert build((0,), (), (), num_tokens=0).slot.numel() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slot": (2, 3, 1)}, r"row 1 has a slot outside \[0, 3\): 3"),
        ({"slot": (-2, 0, 1)}, r"row 0 has a slot outside \[0, 3\): -2"),
        ({"slot": (0, 1, 2**31 - 1)}, r"row 2 has a slot outside"),
        ({"seq_lens": (8, 4, -1)}, "row 2 has a negative context length: -1"),
        ({"seq_lens": (8, 3, 3)}, "row 1 has a negative context length: -1"),
        ({"query_start_loc": (0, 4, 1, 5)}, "row 1 has a negative query length: -3"),
        ({"query_start_loc": (1, 2, 5, 5)}, "rows span tokens 1 to 5 of a step of 5"),
        ({"num_tokens": 4}, "rows span tokens 0 to 5 of a step of 4"),
    ],
)
def test_out_of_range_names_the_row(changes, message):
    with pytest.raises(StepError, match=message) as error:
        build(**changes)
    assert error.value.row == (int(message.split()[1]) if message.startswith("row ") else None)


# on a device -------------------------------------------------------------------------------------


def build_on(steps, starts, seq_lens, slot):
    query_start_loc = torch.tensor(starts, dtype=torch.int32)
    return steps.build(
        query_start_loc=query_start_loc,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        slot=torch.tensor(slot),
        num_tokens=starts[-1],
        max_query_len=int(query_start_loc.diff().max()),
    )


def test_rows_and_padding():
    """A prefill, a verified draft and a decode, then the padding rows of a graph's batch."""
    steps = DeviceSteps(9, torch.device("cpu"))
    step = build_on(steps, (0, 70, 73, 74, 74, 74), (70, 12, 31, 0, 9), (3, 5, 1, 0, 4))
    assert step.query_start_loc.tolist() == [0, 70, 73, 74, 74, 74]
    assert step.context_len.tolist()[:3] == [0, 9, 30]
    assert step.slot.tolist() == [3, 5, 1, NULL_SLOT, NULL_SLOT]
    assert (step.num_tokens, step.max_query_len) == (74, 70)
    assert {t.dtype for t in (step.query_start_loc, step.slot, step.context_len)} == {torch.int32}


def test_rows_of_a_dummy_run_own_no_page():
    """Hosts capture graphs with all rows on slot 0, which no request has."""
    step = build_on(DeviceSteps(5, torch.device("cpu")), (0, 2, 4), (50, 50), (0, 0))
    assert step.slot.tolist() == [NULL_SLOT] * 2


def test_the_same_tensors_in_every_step():
    steps = DeviceSteps(5, torch.device("cpu"))
    first = build_on(steps, (0, 1, 2), (5, 6), (2, 3))
    addresses = [t.data_ptr() for t in (first.query_start_loc, first.slot, first.context_len)]
    second = build_on(steps, (0, 1, 2), (6, 7), (2, 3))
    assert first.context_len.tolist() == second.context_len.tolist() == [5, 6]
    assert addresses == [
        t.data_ptr() for t in (second.query_start_loc, second.slot, second.context_len)
    ]
