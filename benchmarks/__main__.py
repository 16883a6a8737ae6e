"""`python -m benchmarks`, which is `make bench`: everything that docs/ shows, in one run."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import render
from benchmarks.origin import origin, refuse_changes, same_product
from benchmarks.parts import PARTS, expected
from benchmarks.report import MEASURED, OWN_RUNS, Run, console, load_all, shown_unless_red
from qwen3next_plugin.engines.vllm.cpu.cores import binding

OUT = Path("out")


def measure(name: str, out: Path, source: dict[str, str], folder: Path) -> None:
    """Print a part's records and keep them; on a red check exit with 1, without its figure."""
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, name, source)
    for record in shown_unless_red(lambda: PARTS[name].measure(run)):
        record.save(folder)


def measure_all(out: Path, source: dict[str, str], folder: Path) -> list[str]:
    """Measure every part that is not in `folder` yet, one after the other. Returns those red."""
    done = {record.part for record in load_all(folder)}
    missing = {name: why for name, part in PARTS.items() if (why := part.missing())}
    minutes = {name: expected()[name] for name in PARTS if name not in {*done, *missing}}
    for name, why in missing.items():
        console.print(f"{name}: left out, {why}", highlight=False)
    for name, n in minutes.items():
        console.print(f"{name}: {n:.1f} minutes", highlight=False)
    red, left = [], sum(minutes.values())
    console.print(f"[bold]{len(minutes)} parts, {left:.0f} minutes in all[/bold]")
    for i, (name, n) in enumerate(minutes.items(), 1):
        console.print(f"[bold]{name}[/bold], {i} of {len(minutes)}, {left:.0f} minutes left")
        left -= n
        command = [sys.executable, "-m", "benchmarks", "--part", name, "--out", str(out)]
        if subprocess.run([*command, "--origin", json.dumps(source)]).returncode:
            red.append(name)
    return red


def begun(folder: Path, source: dict[str, str], *, resume: bool) -> dict[str, str]:
    """The origin of a fresh run, or of the last one, if it is of this product and machine."""
    refuse_changes(source)
    started = folder / "origin.txt"
    if resume:
        before = json.loads(started.read_text()) if started.exists() else {}
        own = {"run": "", "commit": ""}
        here = before | own == source | own
        if not (here and same_product(before["commit"], source["commit"])):
            raise SystemExit("the last run is of another product, machine or engine: start anew")
        return before
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started.write_text(json.dumps(source))
    return source


def publish(folder: Path) -> None:
    """Make a run's records those of docs/, and write docs/."""
    records = load_all(folder)
    render.check(records)
    for old in MEASURED.glob("*"):
        if old.name not in OWN_RUNS:
            shutil.rmtree(old)
    for record in records:
        record.save(MEASURED)
    render.write()


def main(
    part: Annotated[
        str | None, typer.Option(metavar="PART", help="Only this one; docs/ stays as it is.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted or red run.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for records, logs and models.")] = OUT,
    within: Annotated[str, typer.Option("--origin", hidden=True)] = "",
) -> None:
    source = json.loads(within) if within else origin(datetime.now(UTC).isoformat("T", "seconds"))
    if part is not None:
        if part not in PARTS:
            raise typer.BadParameter(f"no part {part}; --help names them")
        if why := PARTS[part].missing():
            raise SystemExit(f"{part}: {why}")
        for name, value in binding(ranks=1).items():  # upstream would leave a core idle
            os.environ.setdefault(name, value)
        measure(part, out, source, out / ("run" if within else "parts"))
        return
    folder = out / "run"
    source = begun(folder, source, resume=resume)
    if red := measure_all(out, source, folder):
        raise SystemExit(f"not measured: {', '.join(red)}. docs/ stays as it is.")
    publish(folder)


main.__doc__ = """Measure the plugin: all that docs/ shows, on this machine, in one run.

The run writes docs/ when every part is measured; a part alone (--part) only prints its figures and
keeps them in out/parts. It first prints how long each part takes, and needs an otherwise idle
machine with 24 GB of memory, and 45 GB of disk for models, which it writes once.

Plugin and upstream are called in turn, and both must compute the same: on a red check a part exits
with 1 and prints no figure.

\b
""" + "\n".join(f"  {name:<20} {part.says}" for name, part in PARTS.items())


if __name__ == "__main__":
    typer.run(main)
