"""The floors that docs/mtp.md gives are those that are counted."""

from pathlib import Path

import pytest

from benchmarks.mtp.floors import BLOCK, DRAFTS, RELEASED, table
from benchmarks.mtp.steps import BATCHES
from benchmarks.render import load

PAGE = (Path(__file__).parents[1] / "docs" / "mtp.md").read_text()


def test_floors_of_the_page():
    for name, row in table().items():
        cells = " | ".join(f"{floor:.2f}" for floor in row.values())
        assert name.startswith("block model") or f"| {name} | {cells} |" in PAGE


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("k", DRAFTS)
def test_floors_beside_the_measured_steps(k, batch):
    row = load("mtp/steps").rows[f"k = {k}, batch {batch}"]
    assert row["floor"] == pytest.approx(BLOCK.over_plain(k, batch), abs=0.005)


def test_what_a_plain_step_reads():
    assert BLOCK.head / 1e9 == pytest.approx(0.62, abs=0.005)
    assert (BLOCK.step(1) - BLOCK.head) / 1e9 == pytest.approx(0.53, abs=0.005)
    assert BLOCK.head / BLOCK.step(1) == pytest.approx(0.54, abs=0.005)
    assert RELEASED.head / RELEASED.step(1) == pytest.approx(0.09, abs=0.005)
