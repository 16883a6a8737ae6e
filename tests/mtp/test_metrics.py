"""The board of figures: numbers from one process to another, and the line made of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3next_plugin.mtp.metrics import (
    DRAFT,
    PLAIN,
    PROMPT,
    VERIFY,
    Account,
    Board,
    LogLine,
    attach,
    create,
    figures,
)

WRITER = """
import sys
from pathlib import Path
from qwen3next_plugin.mtp.metrics import attach
board = attach(Path(sys.argv[1]), 3)
board.add("seconds", 0.5, "draft")
board.set("acceptance", [0.9, 0.8, 0.7])
"""


def test_another_process_writes_and_this_one_reads(tmp_path):
    path = tmp_path / "board"
    board = create(path, 3)
    board.add("seconds", 1.0, DRAFT)
    subprocess.run([sys.executable, "-c", WRITER, path], check=True)
    assert board.read("seconds") == {PLAIN: 0, VERIFY: 0, DRAFT: 1.5, PROMPT: 0}
    assert board.read("acceptance") == {"1": 0.9, "2": 0.8, "3": 0.7}
    path.unlink()
    board.add("state_folds", 2)  # a board outlives its file
    assert board.read("state_folds") == {"": 2}


def test_a_board_is_nobody_elses(tmp_path):
    path = tmp_path / "board"
    assert attach(path, 1) is None
    create(path, 1)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create(path, 1)


def test_the_longest_draft_allowed_fits_on_a_board():
    board = Board(8)
    board.set("acceptance", range(8))
    assert [*board.read("acceptance").values()] == [*range(8)]
    assert len({figure.name for figure in figures(8)}) == len(figures(8))


def drafted(account: Account, lengths: list[int], seconds: float, drafting: float) -> None:
    """A step of one token committed by each request, and the drafting after it."""
    for i, length in enumerate(lengths):
        account.row(str(i), first=8, tokens=1 + length, committed=1)
        account.verify(length)
    account.step(sum(lengths) > 0, seconds)
    account.draft(drafting, reads_prompt=False)


def test_line_of_what_is_new():
    board = Board(3)
    account = Account(board, 3, linear_layers=6)
    line = LogLine(board)
    account.draft(9.0, reads_prompt=True)
    assert line.text() is None  # nothing was decoded
    drafted(account, [0, 0], seconds=1.0, drafting=0.0)
    drafted(account, [1, 3], seconds=1.5, drafting=0.5)
    board.set("state_pages", [12])
    assert line.text() == (
        "MTP: mean draft length 1.00 (0: 50%, 1: 25%, 3: 25%), 17% of decoding time in drafts, "
        "verify step 1.50 × plain step, 0 folds, 12 state pages in use"
    )
    assert line.text() is None  # nothing new
    drafted(account, [2], seconds=1.0, drafting=1.0)
    assert line.text() == (
        "MTP: mean draft length 2.00 (2: 100%), 50% of decoding time in drafts, "
        "0 folds, 12 state pages in use"
    )


def test_estimates_are_not_asked_for_in_every_step():
    asked = []

    def snapshot() -> dict[str, list[float]]:
        asked.append(1)
        return {"acceptance": [0.5], "step_seconds": [1.0, 2.0], "draft_seconds": [0.0, 0.1]}

    board = Board(1)
    account = Account(board, 1, linear_layers=1)
    assert board.read("acceptance")["1"] != board.read("acceptance")["1"]  # not known: NaN
    for _ in range(100):
        account.estimates(snapshot)
    assert len(asked) == 7
    assert board.read("expected_draft_seconds") == {"1": 0.1}


def test_every_figure_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "mtp.md").read_text()
    rows = {
        name.strip("` "): (kind.strip(), label.strip("` "))
        for line in page.splitlines()
        if line.startswith("| `vllm:qwen3next_")
        for _, name, kind, label, *_ in [line.split("|")]
    }
    ours = {f"vllm:qwen3next_{f.name}": (f.kind, f.label.replace("le", "")) for f in figures(4)}
    assert rows == ours
