"""A program with a run of its own, whose records `make bench` leaves as they are."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import render
from benchmarks.origin import CHANGED, origin
from benchmarks.report import MEASURED, Record, Run, console, shown
from qwen3next_plugin.engines.vllm.cpu.cores import binding


def measure_alone(
    part: str, out: Path, measure: Callable[[Run], Iterator[Record]], *, publish: bool
) -> None:
    """Print a program's records and keep them, for docs/ if they are to be published."""
    for name, value in binding(ranks=1).items():
        os.environ.setdefault(name, value)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, part, origin(datetime.now(UTC).isoformat("T", "seconds")))
    if publish and run.origin["commit"].endswith(CHANGED):
        raise SystemExit("files differ from the commit: commit them, so that figures name a tree")
    folder = MEASURED if publish else out / "parts"
    begin = time.monotonic()
    for record in shown(measure(run)):
        replace(record, seconds=time.monotonic() - begin).save(folder)
    if publish:
        render.write()
    console.print(f"kept in {folder / part}")
