"""`python -m benchmarks.mtp`: what drafts cost in each step, and what they gain for clients."""

from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from benchmarks import parts, report
from benchmarks.mtp import floors, sglang_clients, steps, vllm_clients
from benchmarks.report import OUT, Docs, Out, Quick, Record, Run


class Name(Enum):
    FLOORS = "floors"
    STEPS = "steps"
    CLIENTS = "clients"
    SGLANG_CLIENTS = "sglang-clients"


PARTS = {
    Name.FLOORS: parts.Part(floors.measure),
    Name.STEPS: parts.Part(steps.measure, in_quick=False),
    Name.CLIENTS: parts.Part(vllm_clients.measure),
    Name.SGLANG_CLIENTS: parts.Part(sglang_clients.measure, in_quick=False, needs_sglang=True),
}


def measure(run: Run, only: Name | None = None) -> Iterator[Record]:
    """All records of this folder, or those of one part."""
    return parts.measure(run, PARTS, only)


def main(
    part: Annotated[Name | None, typer.Option(help="Measure only this part.")] = None,
    out: Out = OUT,
    quick: Quick = False,
    docs: Docs = False,
) -> None:
    """What does MTP cost in each step, and what does it gain for clients?

    floors: the least that a verify step can cost, counted in bytes; nothing is run.
    steps: verify steps of k drafts on the block model, in plain steps; plugin and upstream.
    clients: tokens per second of `vllm serve` by draft policy, with 1, 4 and 16 clients.
    sglang-clients: the same of SGLang; needs `make setup ENGINE=sglang`.

    Drafts must not change the text: log-probabilities (steps) and answers (clients) are compared
    with those without drafts first. If they differ, the command exits with 1 and prints no figure.
    """
    run = Run(__package__, out, quick)
    report.finish(run, lambda: measure(run, part), docs=docs)


if __name__ == "__main__":
    typer.run(main)
