"""A program with a run of its own, whose records `make bench` leaves as they are."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import render
from benchmarks.origin import origin, refuse_changes
from benchmarks.report import MEASURED, Record, Run, console, shown_unless_red
from qwen3next_plugin.engines.vllm.cpu.cores import binding


def measure_alone(
    part: str, out: Path, measure: Callable[[Run], Iterator[Record]], *, publish: bool
) -> None:
    """Print a program's records and keep them, for docs/ if they are to be published."""
    for name, value in binding(ranks=1).items():
        os.environ.setdefault(name, value)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, part, origin(datetime.now(UTC).isoformat("T", "seconds")))
    if publish:
        refuse_changes(run.origin)
    folder = MEASURED if publish else out / "parts"
    for record in shown_unless_red(lambda: measure(run)):
        record.save(folder)
    if publish:
        render.write()
    console.print(f"kept in {folder / part}")
