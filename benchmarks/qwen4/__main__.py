"""`python -m benchmarks.qwen4`: what Qwen3.8-Flash-Next has beyond the family.

It needs a quiet machine of two cores, 24 GB of memory, 22 GB of disk for models, which it writes
once, and 10 minutes.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.own_run import measure_alone
from benchmarks.qwen4.measure import measure
from benchmarks.report import QWEN4


def main(
    out: Annotated[Path, typer.Option(help="For models, logs and records.")] = Path("out"),
    publish: Annotated[bool, typer.Option("--publish", help="Write the figures of docs/.")] = False,
) -> None:
    """Measure layers of the released shapes: steps, prompts, drafts, n-grams, attention.

    A quarter of the released layers, experts and vocabulary; random weights. Answers are
    known by construction, and log-probabilities are compared with transformers' before its times.
    """
    measure_alone(QWEN4, out, measure, publish=publish)


if __name__ == "__main__":
    typer.run(main)
