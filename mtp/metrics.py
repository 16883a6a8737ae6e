"""Figures: what drafting does and costs, as numbers that another process can read.

An engine drafts in one process and serves its metrics from another. Between the two lies a board: a
page of shared memory with one number in each place. Writing a figure is one addition; nothing is
sent, nothing waits, and whoever reads finds what is true now.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, Literal

from qwen3next_plugin.kernels.step import GRID

PLAIN, VERIFY, DRAFT, PROMPT = "plain", "verify", "draft", "prompt"
ESTIMATES_EVERY = 16  # steps; no clock, which the schedule would then depend on
ESTIMATES = {  # figure → what it is in a schedule's snapshot, from which index on
    "acceptance": ("acceptance", 0),
    "expected_step_seconds": ("step_seconds", 0),
    "expected_draft_seconds": ("draft_seconds", 1),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, or one for each value of a label."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)


def figures(k: int) -> tuple[Figure, ...]:
    """All figures of an engine that drafts up to k tokens."""
    zero_to_k, one_to_k = (tuple(map(str, range(n, k + 1))) for n in (0, 1))
    return (
        Figure(
            "draft_length",
            "histogram",
            "Draft tokens of each decoding request in each step",
            "le",
            zero_to_k,
        ),
        Figure(
            "steps",
            "counter",
            "Steps that read no prompt: plain, and with drafts to verify",
            "kind",
            (PLAIN, VERIFY),
        ),
        Figure(
            "seconds",
            "counter",
            "Seconds in such steps (plain, verify), in drafting after them (draft), and in taking"
            " prompts into the MTP layer and drafting for them (prompt)",
            "kind",
            (PLAIN, VERIFY, DRAFT, PROMPT),
        ),
        Figure(
            "drafts_skipped",
            "counter",
            "Times that a decoding request drafted nothing and skipped the MTP layer",
        ),
        Figure(
            "tokens_caught_up", "counter", "Tokens that the MTP layer took in after skipping them"
        ),
        Figure(
            "state_folds",
            "counter",
            "Times that the S of a request in a linear layer was moved on and written",
        ),
        Figure("state_pages", "gauge", "State pages that requests hold, in all linear layers"),
        Figure(
            "acceptance",
            "gauge",
            "Estimate: that a draft token is accepted, given those before it",
            "position",
            one_to_k,
        ),
        Figure(
            "expected_step_seconds",
            "gauge",
            "Estimate: seconds of a step with so many draft tokens a request, at the batch of now",
            "drafts",
            zero_to_k,
        ),
        Figure(
            "expected_draft_seconds",
            "gauge",
            "Estimate: seconds to draft so many tokens, at the batch of now",
            "drafts",
            one_to_k,
        ),
    )


class Board:
    """Every figure's numbers; one process writes a figure, any may read it."""

    def __init__(self, k: int, memory: Any = None) -> None:
        self.figures = {figure.name: figure for figure in figures(k)}
        places = [(f.name, value) for f in self.figures.values() for value in f.values]
        self.place = {place: i for i, place in enumerate(places)}
        self.numbers = memoryview(memory or bytearray(mmap.PAGESIZE)).cast("d")

    def add(self, name: str, amount: float = 1, value: object = "") -> None:
        self.numbers[self.place[name, str(value)]] += amount

    def set(self, name: str, numbers: Sequence[float]) -> None:
        """One for each value of the figure's label."""
        for value, number in zip(self.figures[name].values, numbers, strict=True):
            self.numbers[self.place[name, value]] = number

    def read(self, name: str) -> dict[str, float]:
        """By value of the label."""
        return {value: self.numbers[self.place[name, value]] for value in self.figures[name].values}


def create(path: Path, k: int) -> Board:
    """A board of zeros in a new file that only this user can read.

    Raises: FileExistsError where there is one.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(handle, mmap.PAGESIZE)
        return Board(k, mmap.mmap(handle, mmap.PAGESIZE))
    finally:
        os.close(handle)


def attach(path: Path, k: int) -> Board | None:
    """The board in a file, if it is there."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return Board(k, mmap.mmap(handle, mmap.PAGESIZE))
    finally:
        os.close(handle)


class Folds:
    """How often S is written, from where the requests stand: once where a row passes a grid point.

    Short rows leave S at the last grid point that nothing can be taken back from, their own begin
    at the latest; long ones at the last in them.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._stands: dict[str, tuple[int, int]] = {}  # request → (next position, grid point of S)

    def row(self, request: str, first: int, tokens: int, committed: int) -> bool:
        """Whether S is written for `tokens` tokens from `first` on, of which some are committed."""
        end, stood = self._stands.get(request, (-1, 0))
        if end != first:  # new or resumed: its page stands where it begins
            stood = first // GRID
        stands = (first + tokens if tokens > self.k + 1 else first) // GRID
        self._stands[request] = first + committed, stands
        return stands > stood

    def forget(self, request: str) -> None:
        self._stands.pop(request, None)


class Account:
    """What a drafter enters on a board."""

    def __init__(self, board: Board, k: int, linear_layers: int) -> None:
        self.board, self.layers = board, linear_layers
        self.folds = Folds(k)
        self._steps = 0
        for name in ESTIMATES:
            board.set(name, [nan] * len(board.figures[name].values))

    def row(self, request: str, first: int, tokens: int, committed: int) -> None:
        """A request's part of a step."""
        if self.folds.row(request, first, tokens, committed):
            self.board.add("state_folds", self.layers)

    def verify(self, drafted: int) -> None:
        """The part of a decoding request, its draft being so long."""
        self.board.add("draft_length", value=drafted)

    def step(self, drafted: bool, seconds: float) -> None:
        """A step that read no prompt."""
        kind = VERIFY if drafted else PLAIN
        self.board.add("steps", value=kind)
        self.board.add("seconds", seconds, kind)

    def draft(self, seconds: float, *, reads_prompt: bool) -> None:
        """What the drafter did between two steps."""
        self.board.add("seconds", seconds, PROMPT if reads_prompt else DRAFT)

    def skipped(self) -> None:
        self.board.add("drafts_skipped")

    def caught_up(self, tokens: int) -> None:
        self.board.add("tokens_caught_up", tokens)

    def forget(self, request: str) -> None:
        self.folds.forget(request)

    def estimates(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        """What the schedule expects, now and then."""
        self._steps += 1
        if self._steps % ESTIMATES_EVERY != 1:
            return
        known = snapshot()
        for name, (key, first) in ESTIMATES.items():
            if key in known:
                self.board.set(name, known[key][first:])


class LogLine:
    """What has happened since the last line, in one line."""

    NAMES = ("draft_length", "steps", "seconds", "state_folds")

    def __init__(self, board: Board) -> None:
        self.board = board
        self.before = {name: board.read(name) for name in self.NAMES}

    def text(self) -> str | None:
        """The line, or none where nothing was decoded."""
        now = {name: self.board.read(name) for name in self.NAMES}
        new = {
            name: {value: number - self.before[name][value] for value, number in numbers.items()}
            for name, numbers in now.items()
        }
        rows = sum(new["draft_length"].values())
        if not rows:
            return None
        self.before = now
        return f"MTP: {', '.join(self._parts(new, rows))}"

    def _parts(self, new: dict[str, dict[str, float]], rows: float) -> Iterator[str]:
        lengths, seconds = new["draft_length"], new["seconds"]
        mean = sum(int(n) * count for n, count in lengths.items()) / rows
        shares = ", ".join(f"{n}: {count / rows:.0%}" for n, count in lengths.items() if count)
        yield f"mean draft length {mean:.2f} ({shares})"
        if total := seconds[PLAIN] + seconds[VERIFY] + seconds[DRAFT]:
            yield f"{seconds[DRAFT] / total:.0%} of decoding time in drafts"
        if all(new["steps"].values()):
            ratio = seconds[VERIFY] / new["steps"][VERIFY] * new["steps"][PLAIN] / seconds[PLAIN]
            yield f"verify step {ratio:.2f} × plain step"
        yield f"{new['state_folds']['']:.0f} folds"
        yield f"{self.board.read('state_pages')['']:.0f} state pages in use"
