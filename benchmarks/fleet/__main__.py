"""`python -m benchmarks.fleet`: prefill apart, beside prompts, equal bits, restarts, replicas.

It needs a quiet machine of two cores, 24 GB of memory, and 30 minutes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.fleet import apart, beside, bits, folder, reload, replicas
from benchmarks.own_run import measure_alone
from benchmarks.report import FLEET, Record, Run

PARTS = {
    "apart": apart.measure,
    "beside": beside.measure,
    "bits": bits.measure,
    "folder": folder.measure,
    "reload": reload.measure,
    "replicas": replicas.measure,
}


def main(
    part: Annotated[
        list[str] | None, typer.Option(metavar="PART", help=f"Only these: {', '.join(PARTS)}.")
    ] = None,
    out: Annotated[Path, typer.Option(help="For models, logs and records.")] = Path("out"),
    publish: Annotated[bool, typer.Option("--publish", help="Write the figures of docs/.")] = False,
) -> None:
    """Measure prefill apart, beside prompts, the same bits, a prefix folder, replicas, reloads."""
    if unknown := set(part or ()) - PARTS.keys():
        raise typer.BadParameter(f"no part {', '.join(unknown)}: {', '.join(PARTS)}")

    def measure(run: Run) -> Iterator[Record]:
        for name in part or PARTS:
            yield from PARTS[name](run)

    measure_alone(FLEET, out, measure, publish=publish)


if __name__ == "__main__":
    typer.run(main)
