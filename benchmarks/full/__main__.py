"""`python -m benchmarks.full`: a released size with all its layers, from start to drafts.

Four layers hide what a user of forty meets: the start, packing, what happens between kernels. It
needs a quiet machine, 24 GB of memory and, for Qwen3.6-35B-A3B in 4 bits, 65 GB of disk and an
hour, half of it for other engines, where `make` has built them (see benchmarks/peers).
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.full.measure import measure
from benchmarks.full.model import KINDS
from benchmarks.own_run import measure_alone
from benchmarks.report import FULL


def main(
    size: Annotated[str, typer.Option(help="A folder of examples/configs.")] = "Qwen3.6-35B-A3B",
    kind: Annotated[str, typer.Option(help=f"Stored weights: {', '.join(KINDS)}.")] = "int4",
    layers: Annotated[int | None, typer.Option(help="Only the first of them.")] = None,
    out: Annotated[Path, typer.Option(help="For models, logs and records.")] = Path("out"),
    publish: Annotated[bool, typer.Option("--publish", help="Write the figures of docs/.")] = False,
) -> None:
    """Measure a released size with random weights: start, memory, steps, prompts, drafts.

    Steps are compared with the bytes that they must read, prompts with the products of one large
    layer in bf16, both at rates of the seconds before and after. llama.cpp and ik_llama.cpp, where
    they are built, compute a model in 4 bits with the same weights.
    """
    if kind not in KINDS:
        raise typer.BadParameter(f"no kind {kind}: one of {', '.join(KINDS)}")
    measured = partial(measure, size=size, kind=kind, layers=layers)
    measure_alone(FULL, out, measured, publish=publish)


if __name__ == "__main__":
    typer.run(main)
