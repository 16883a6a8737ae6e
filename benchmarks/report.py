"""One format for everything that a benchmark measures: a record, kept as JSON, printed as a table.

out/run/<name>.json      of a whole run, under way or done
out/parts/<name>.json    of a part that was measured alone; never in docs/
benchmarks/measured/     of the last whole run, and of those of OWN_RUNS: docs/ shows them
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

MEASURED = Path(__file__).parent / "measured"
FULL, FLEET, QWEN4 = "full", "fleet", "qwen4"
AS_RELEASED, MAPPED = "as released", "packed, mapped"  # rows of the starts of the full size
OWN_RUNS = (FULL, FLEET, QWEN4)  # parts, and their folders, that have a run of their own
ROUNDS = ", rounds"  # behind the name of a column: the range of its rounds
WIDE = 400  # columns; no line of a table is broken, so that it can be pasted into a page

console = Console(stderr=True)  # progress and checks; standard output has only the figures

Cell = int | float | str
Rows = Mapping[str, Mapping[str, Cell]]  # row → column → value


class RedCheckError(AssertionError):
    """Two sides compute different results; no figure may be printed."""


@dataclass(frozen=True, slots=True)
class Record:
    """The answer to one question: a table, and what a reader must know to trust it."""

    name: str  # "engines/steps": where it is kept
    question: str
    case: str  # model and settings
    units: dict[str, str]  # column → unit, in the table's order; "" for ratios
    rows: Rows
    origin: dict[str, str]  # run, commit, versions and machine: see origin.py
    date: str
    part: str
    seconds: float = 0.0  # that its part took

    def save(self, folder: Path) -> Path:
        """Write it under `folder`, by its name."""
        path = folder / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> "Record":
        return cls(**json.loads(path.read_text()))

    @property
    def columns(self) -> list[str]:
        return [f"{name}, {unit}" if unit else name for name, unit in self.units.items()]

    def cells(self) -> list[list[str]]:
        """Rows as text, each with its name first. A value that is missing leaves its cell empty."""
        return [
            [name, *(text(row.get(column, "")) for column in self.units)]
            for name, row in self.rows.items()
        ]

    @property
    def source(self) -> str:
        """All that is known of what, where and when it was measured, in a line."""
        where = "; ".join(value for key, value in self.origin.items() if key != "run")
        return f"{where}; {self.date}"

    @property
    def place(self) -> str:
        """Machine, commit and date, in a line."""
        where = (self.origin[key] for key in ("processor", "cores", "commit"))
        return f"{', '.join(where)}; {self.date}"


@dataclass(frozen=True, slots=True)
class Run:
    """What measures a part: where it writes, and what its records share."""

    out: Path  # logs and models; records are in folders of it
    part: str
    origin: dict[str, str]

    def record(
        self, name: str, question: str, case: str, units: dict[str, str], rows: Rows
    ) -> Record:
        """What was measured, with this run's origin and the date."""
        date = datetime.now(UTC).date().isoformat()
        return Record(name, question, case, units, rows, self.origin, date, self.part)


def load_all(folder: Path) -> list[Record]:
    """All records of a folder, by name."""
    return [Record.load(path) for path in sorted(folder.rglob("*.json"))]


def text(cell: Cell) -> str:
    """Three significant digits; integers and words as they are."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or cell >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.{1 if cell >= 10 else 2 if cell >= 1 else 3}f}"


def shown(records: Iterable[Record]) -> list[Record]:
    """Records as they come, each printed on the standard output; the table is Markdown."""
    wide, kept = Console(width=WIDE, highlight=False), []
    for record in records:
        wide.print(f"\n{record.question}", style="bold", markup=False)
        wide.print(f"{record.case}. {record.source}", markup=False)
        table = Table(*["", *record.columns], box=box.MARKDOWN)
        for cells in record.cells():
            table.add_row(*cells)
        wide.print(table, markup=False)
        kept.append(record)
    return kept


def shown_unless_red(
    measure: Callable[[], Iterable[Record]],
    on_red: Callable[[str], object] = lambda complaint: None,
) -> list[Record]:
    """Measure, and show the records; on a red check exit with 1, without its figure.

    Records get the seconds that all took. `on_red` takes the complaint.
    """
    begin = time.monotonic()
    try:
        kept = shown(measure())
    except RedCheckError as complaint:
        print(f"red, so there is no figure: {complaint}", file=sys.stderr)
        on_red(str(complaint))
        raise SystemExit(1) from complaint
    seconds = time.monotonic() - begin
    return [replace(record, seconds=seconds) for record in kept]
