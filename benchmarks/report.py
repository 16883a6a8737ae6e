"""One format for everything that a benchmark measures: a record, kept as JSON, printed as a table.

out/<name>.json          of a full run
out/quick/<name>.json    of a quick run; never in docs/
benchmarks/measured/     the records that docs/ shows, written by --docs
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

MEASURED = Path(__file__).parent / "measured"
ROUNDS = ", rounds"  # behind the name of a column: the range of its rounds
WIDE = 400  # columns; no line of a table is broken, so that it can be pasted into a page
QUICK = "QUICK: few rounds, small models. A smoke test; the figures are not for docs/."

console = Console(stderr=True)  # progress and checks; standard output has only the figures

Cell = int | float | str
Rows = Mapping[str, Mapping[str, Cell]]  # row → column → value

Out = Annotated[Path, typer.Option(help="Folder for records, logs and generated models.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="A smoke test: about two minutes on two idle cores. Never in docs/."
    ),
]
Docs = Annotated[
    bool, typer.Option(help="Copy the records to benchmarks/measured/ and rewrite docs/ from them.")
]
OUT = Path("out")


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
    machine: dict[str, str]
    command: str
    date: str
    quick: bool

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
    def origin(self) -> str:
        """Machine and date, in a line."""
        return f"{', '.join(self.machine.values())}; {self.date}"

    @property
    def source(self) -> str:
        """Machine, date and command, in a line."""
        return f"{self.origin}; `{self.command}`{'; quick' if self.quick else ''}"


@dataclass(frozen=True, slots=True)
class Run:
    """One command that measures: where it writes, and what all of its records share."""

    package: str
    out: Path
    quick: bool

    def record(
        self,
        name: str,
        question: str,
        case: str,
        units: dict[str, str],
        rows: Rows,
        on: dict[str, str] | None = None,
    ) -> Record:
        """What was measured, with this run's machine (or another), command and date."""
        options = [option for option in sys.argv[1:] if option != "--docs"]
        command = " ".join(["python -m", self.package.removesuffix(".__main__"), *options])
        date = datetime.now(UTC).date().isoformat()
        return Record(name, question, case, units, rows, on or machine(), command, date, self.quick)

    @property
    def records(self) -> Path:
        """The folder of this run's records."""
        return self.out / "quick" if self.quick else self.out


def text(cell: Cell) -> str:
    """Three significant digits; integers and words as they are."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or cell >= 100:
        return f"{cell:,.0f}"
    return f"{cell:.{1 if cell >= 10 else 2 if cell >= 1 else 3}f}"


def machine() -> dict[str, str]:
    """What a reader must know of the machine that gave the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0))
    return {
        "processor": next(names, platform.processor()),
        "cores": f"{cores} core{'s' * (cores > 1)}",
        "instruction sets": " ".join(flag for flag in wanted if flag in flags),
        "torch": f"torch {torch.__version__}",
    }


def finish(
    run: Run, measured: Callable[[], Iterable[Record]], *, docs: bool = False, keep: bool = True
) -> None:
    """Print and keep each record as it comes; on a red check exit with 1, without its figure."""
    if keep:
        run.out.mkdir(parents=True, exist_ok=True)
    if run.quick:
        console.print(f"[bold]{QUICK}[/bold]")
    records = []
    try:
        for record in measured():
            show(record)
            if keep:
                record.save(run.records)
            records.append(record)
    except AssertionError as complaint:
        print(f"red, so there is no figure: {complaint}", file=sys.stderr)
        raise SystemExit(1) from complaint
    if run.quick:
        print(f"\n{QUICK}")
    if docs:
        publish(run, records)


def publish(run: Run, records: Iterable[Record]) -> None:
    """Put full records among those of docs/, and rewrite docs/; a quick run changes nothing."""
    from benchmarks import render

    if run.quick:
        console.print("quick, so docs/ stays as it is")
        return
    for record in records:
        record.save(MEASURED)
    render.write()


def show(record: Record) -> None:
    """Print a record on the standard output; the table is Markdown."""
    wide = Console(width=WIDE, highlight=False)
    wide.print(f"\n{record.question}", style="bold", markup=False)
    wide.print(f"{record.case}. {record.source}", markup=False)
    table = Table(*["", *record.columns], box=box.MARKDOWN)
    for cells in record.cells():
        table.add_row(*cells)
    wide.print(table, markup=False)
