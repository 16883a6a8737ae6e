"""What steps with MTP must read is counted: no step is below it."""

import pytest

from benchmarks.engines.steps import BATCHES
from benchmarks.mtp.floors import BLOCK
from benchmarks.report import MEASURED, load_all


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_the_least_is_below_any_routing(num_drafts, batch):
    """Whatever experts a plain step, a verify step and the drafts choose."""
    least = BLOCK.over_plain(num_drafts, batch)
    assert 1 < least < BLOCK.expected(num_drafts, batch)
    fewest, most = BLOCK.active, min(BLOCK.experts, batch * BLOCK.active)
    for plain in (fewest, (fewest + most) / 2, most):
        for verify in (plain, min(BLOCK.experts, (num_drafts + 1) * plain)):
            for draft in (fewest, most):
                read = BLOCK.reading(verify) + num_drafts * BLOCK.draft(draft)
                assert read / BLOCK.reading(plain) >= least - 1e-9


def test_no_measured_step_is_below_it():
    (record,) = (record for record in load_all(MEASURED) if record.name == "mtp/steps")
    assert record.rows
    for name, row in record.rows.items():
        words = name.replace(",", "").split()  # draft of 3, batch 8
        least = BLOCK.over_plain(*(int(word) for word in words if word.isdigit()))
        assert row["bytes, at least"] == pytest.approx(least, abs=0.005)
        assert min(row["plugin"], row["upstream"]) >= row["bytes, at least"], name


def test_what_a_plain_step_reads():
    assert BLOCK.head / 1e9 == pytest.approx(0.62, abs=0.005)
    assert (BLOCK.step(1) - BLOCK.head) / 1e9 == pytest.approx(0.53, abs=0.005)
