"""The board: numbers from one process to another; the observer that writes them; the log line."""

import subprocess
import sys
from collections.abc import Mapping
from mmap import PAGESIZE
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from needs import needs
from qwen3next_plugin.mtp.metrics import (
    CATCH_UP,
    DRAFT,
    PLAIN,
    VERIFY,
    Board,
    LogLine,
    Observer,
    attach,
    create,
    metrics,
)
from qwen3next_plugin.mtp.policy import Fixed
from qwen3next_plugin.mtp.rows import Row, Tokens

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
    assert board.read("seconds") == {PLAIN: 0, VERIFY: 0, DRAFT: 1.5, CATCH_UP: 0}
    assert board.read("acceptance") == {"1": 0.9, "2": 0.8, "3": 0.7}
    path.unlink()
    board.add("drafts_skipped", 2)  # a board outlives its file
    assert board.read("drafts_skipped") == {"": 2}


def test_a_board_is_nobody_elses(tmp_path):
    path = tmp_path / "board"
    assert attach(path, 1) is None
    create(path, 1)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        create(path, 1)


# In a namespace of its own: a file system of 64 KB, all of it taken.
FULL = """
mount -t tmpfs -o size=64k full "$1"
cat /dev/zero > "$1/all" 2>/dev/null
exec "$2" -c "$3" "$1/board"
"""
ON_FULL_DISK = """
import sys
from pathlib import Path
from qwen3next_plugin.mtp.metrics import create
path = Path(sys.argv[1])
try:
    create(path, 3).add("steps", value="plain")
except OSError as error:
    print(error.strerror, path.exists())
"""


@needs("mounts")
def test_a_full_disk_is_an_error_when_the_board_is_made(tmp_path):
    """Not the end of the process when it is written."""
    script = ["sh", "-c", FULL, "sh", tmp_path, sys.executable, ON_FULL_DISK]
    done = subprocess.run(["unshare", "-rm", *script], capture_output=True, text=True)
    assert done.stdout == "No space left on device False\n", done


def test_a_boards_memory_is_taken_when_it_is_made(tmp_path):
    create(tmp_path / "board", 3)
    assert (tmp_path / "board").stat().st_blocks * 512 >= PAGESIZE


def test_the_longest_draft_allowed_fits_on_a_board():
    board = Board(8)
    board.set("acceptance", range(8))
    assert [*board.read("acceptance").values()] == [*range(8)]
    assert len({metric.name for metric in metrics(8)}) == len(metrics(8))


def tokens(count: int, first: int = 8) -> Tokens:
    return Tokens(first, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 1))


def row(request: str, drafted: int, accepted: int = 0, **given: Any) -> Row:
    """A row whose draft the step verified."""
    given = {"index": 0, "continues": True, "fed": tokens(1 + accepted)} | given
    return Row(request=request, tokens=tokens(1 + accepted), scheduled=1 + drafted, **given)


def drafted(observer: Observer, lengths: list[int], seconds: float, drafting: float) -> None:
    """A step of one token committed by each request, and the drafting after it."""
    rows = [row(str(i), length) for i, length in enumerate(lengths)]
    observer.observe_step(rows, seconds)
    observer.observe_draft(rows, passes_seconds=drafting, seconds=drafting)


def test_line_of_what_is_new():
    board = Board(3)
    observer = Observer(Fixed(3), board)
    line = LogLine(board)
    prompt = [row("a", 3, continues=False, fed=None)]
    observer.observe_step(prompt, 9.0)
    observer.observe_draft(prompt, passes_seconds=0.0, seconds=0.0)
    assert line.text() is None  # nothing was decoded
    drafted(observer, [0, 0], seconds=1.0, drafting=0.0)
    drafted(observer, [1, 3], seconds=1.5, drafting=0.5)
    board.set("state_pages", [12])
    assert line.text() == (
        "MTP: mean draft length 1.00 (0: 50%, 1: 25%, 3: 25%), 17% of decoding time in drafts, "
        "verify step 1.50 × plain step, 12 state pages in use"
    )
    assert line.text() is None  # nothing new
    drafted(observer, [2], seconds=1.0, drafting=1.0)
    assert line.text() == (
        "MTP: mean draft length 2.00 (2: 100%), 50% of decoding time in drafts, "
        "12 state pages in use"
    )


class Recorder(Fixed):
    """A policy that writes down what it is given."""

    def __init__(self, snapshot: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(1)
        self.calls: list[tuple[Any, ...]] = []
        self.known = dict(snapshot)

    def observe_verify(self, *given: Any) -> None:
        self.calls.append(("verify", *given))

    def observe_step(self, *given: Any) -> None:
        self.calls.append(("step", *given))

    def observe_draft(self, *given: Any) -> None:
        self.calls.append(("draft", *given))

    def forget(self, *given: Any) -> None:
        self.calls.append(("forget", *given))

    def snapshot(self) -> dict[str, Any]:
        self.calls.append(("snapshot",))
        return self.known


@pytest.mark.parametrize("board", [None, Board(3)], ids=["no board", "board"])
def test_the_policy_learns_from_steps_and_drafts_that_read_no_prompt(board):
    policy = Recorder()
    observer = Observer(policy, board)
    decoding = [row("a", 3, accepted=2, draft=2), row("b", 0, draft=1, fed=None)]
    observer.observe_step(decoding, 1.0)
    observer.observe_draft(decoding, passes_seconds=0.25, seconds=0.5)
    mixed = [*decoding, row("c", 7, continues=False)]
    observer.observe_step(mixed, 4.0)
    observer.observe_draft(mixed, passes_seconds=2.0, seconds=2.0)
    observer.observe_step(decoding[:1], None)  # not timed
    observer.observe_draft(decoding, passes_seconds=None, seconds=1.0)
    observer.observe_step([], 1.0)
    observer.observe_draft([], passes_seconds=1.0, seconds=1.0)
    observer.keep_only({"a", "d"})
    observer.keep_only({"a", "d"})
    calls = [call for call in policy.calls if call != ("snapshot",)]
    verified = [("verify", "a", 3, 2), ("verify", "b", 0, 0)]
    assert calls[:4] == [*verified, ("step", 2, 5, 1.0), ("draft", 2, 2, 0.25)]
    assert calls[4:7] == [*verified, ("verify", "a", 3, 2)]
    assert sorted(calls[7:]) == [("forget", "b"), ("forget", "c")]


def test_the_board_counts_steps_drafts_and_tokens():
    board = Board(3)
    observer = Observer(Recorder(), board)
    rows = [row("a", 3, accepted=2, fed=tokens(8, first=3)), row("b", 0, fed=None)]
    observer.observe_step(rows, 1.0)
    observer.observe_draft(rows, passes_seconds=0.25, seconds=0.5)
    prompt = [row("c", 6, continues=False, fed=None)]  # neither a draft nor one skipped
    observer.observe_step(prompt, 2.0)
    observer.observe_draft(prompt, passes_seconds=0.0, seconds=0.25)
    assert board.read("draft_length") == {"0": 1, "1": 0, "2": 0, "3": 1}
    assert board.read("drafts_verified") == {"1": 1, "2": 1, "3": 1}  # the third was rejected
    assert board.read("drafts_accepted") == {"1": 1, "2": 1, "3": 0}
    assert board.read("steps") == {PLAIN: 0, VERIFY: 1}
    assert board.read("seconds") == {PLAIN: 0, VERIFY: 1.0, DRAFT: 0.25, CATCH_UP: 0.5}
    assert board.read("drafts_skipped") == {"": 1}
    assert board.read("tokens_caught_up") == {"": 5}


def test_drafts_after_a_rejected_one_are_not_verified():
    board = Board(3)
    observer = Observer(Recorder(), board)
    accepted = [(3, 0), (3, 3), (2, 1), (2, 2), (1, 0), (0, 0), (3, 0)]
    observer.observe_step([row(str(i), *each) for i, each in enumerate(accepted)], 1.0)
    assert board.read("drafts_verified") == {"1": 6, "2": 3, "3": 1}
    assert board.read("drafts_accepted") == {"1": 3, "2": 2, "3": 1}


def test_estimates_are_not_asked_for_in_every_step():
    policy = Recorder(
        {"acceptance": [0.5], "step_seconds": [1.0, 2.0], "draft_seconds": [0.0, 0.1]}
    )
    board = Board(1)
    observer = Observer(policy, board)
    assert board.read("acceptance")["1"] != board.read("acceptance")["1"]  # not known: NaN
    for _ in range(100):
        observer.observe_draft([], passes_seconds=0.0, seconds=0.0)
    assert policy.calls.count(("snapshot",)) == 7
    assert board.read("expected_draft_seconds") == {"1": 0.1}


def test_every_metric_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "mtp.md").read_text()
    rows = {
        name.strip("` "): (kind.strip(), label.strip("` "))
        for line in page.splitlines()
        if line.startswith("| `qwen3next_")
        for _, name, kind, label, *_ in [line.split("|")]
    }
    ours = {f"qwen3next_{m.name}": (m.kind, m.label.replace("le", "")) for m in metrics(4)}
    assert rows == ours
