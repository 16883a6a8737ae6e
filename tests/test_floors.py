"""What steps with MTP must read is counted: the page has all of it, and no step is below it."""

import pytest

from benchmarks.engines.steps import BATCHES
from benchmarks.mtp.floors import BLOCK, DRAFTS, RELEASED, table
from benchmarks.render import DOCS
from benchmarks.report import MEASURED, load_all

PAGE = (DOCS / "mtp.md").read_text()
MODELS = pytest.mark.parametrize("model", [BLOCK, RELEASED], ids=["block", "released"])


def test_every_row_is_on_the_page():
    rows = table()
    assert len(rows) == 8
    for name, row in rows.items():
        cells = " | ".join(f"{floor:.2f}" for floor in row.values())
        assert f"| {name} | {cells} |" in PAGE


@MODELS
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_drafts", DRAFTS)
def test_the_least_is_below_any_routing(model, num_drafts, batch):
    """Whatever experts a plain step, a verify step and the drafts choose."""
    least = model.over_plain(num_drafts, batch)
    assert 1 < least < model.expected(num_drafts, batch)
    fewest, most = model.active, min(model.experts, batch * model.active)
    for plain in (fewest, (fewest + most) / 2, most):
        for verify in (plain, min(model.experts, (num_drafts + 1) * plain)):
            for draft in (fewest, most):
                read = model.reading(verify) + num_drafts * model.draft(draft)
                assert read / model.reading(plain) >= least - 1e-9


def test_no_measured_step_is_below_it():
    for record in load_all(MEASURED):
        for name, row in record.rows.items() if record.name == "mtp/steps" else ():
            words = name.replace(",", "").split()  # draft of 3, batch 8
            least = BLOCK.over_plain(*(int(word) for word in words if word.isdigit()))
            assert row["bytes, at least"] == pytest.approx(least, abs=0.005)
            assert min(row["plugin"], row["upstream"]) >= row["bytes, at least"], name


def test_what_a_plain_step_reads():
    assert BLOCK.head / 1e9 == pytest.approx(0.62, abs=0.005)
    assert (BLOCK.step(1) - BLOCK.head) / 1e9 == pytest.approx(0.53, abs=0.005)
    for model, name in ((BLOCK, "block model"), (RELEASED, "released model")):
        share = f"{100 * model.head / model.step(1):.0f} %"
        assert share in PAGE.partition("The output head is")[2].partition(name)[0]
    assert f"{BLOCK.draft_rows * BLOCK.D / 1e6:.0f} MB of [draft head]" in PAGE
