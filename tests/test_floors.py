"""The floors that docs/mtp.md gives are those that are counted."""

from pathlib import Path

import pytest

from benchmarks.mtp.floors import BLOCK, RELEASED, table

PAGE = (Path(__file__).parents[1] / "docs" / "mtp.md").read_text()


def test_floors_of_the_page():
    for name, row in table().items():
        cells = " | ".join(f"{floor:.2f}" for floor in row.values())
        assert f"| {name} | {cells} |" in PAGE


def test_what_a_plain_step_reads():
    assert BLOCK.head / 1e9 == pytest.approx(0.62, abs=0.005)
    assert (BLOCK.step(1) - BLOCK.head) / 1e9 == pytest.approx(0.53, abs=0.005)
    assert BLOCK.head / BLOCK.step(1) == pytest.approx(0.54, abs=0.005)
    assert RELEASED.head / RELEASED.step(1) == pytest.approx(0.09, abs=0.005)
