"""`python -m benchmarks.mtp`: what drafts cost in each step, and what they gain for clients."""

from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from benchmarks import parts, report
from benchmarks.mtp import cases, clients, floors, steps
from benchmarks.report import OUT, Docs, Out, Quick, Record, Run


class Name(Enum):
    FLOORS = "floors"
    STEPS = "steps"
    CLIENTS = "clients"


PARTS = {
    Name.FLOORS: parts.Part(floors.measure),
    Name.STEPS: parts.Part(steps.measure, in_quick=False),
    Name.CLIENTS: parts.Part(clients.measure),
}


def measure(run: Run, only: Name | None = None) -> Iterator[Record]:
    """All records of this folder, or those of one part."""
    return parts.measure(run, PARTS, only)


def main(
    part: Annotated[Name | None, typer.Option(help="Measure only this part.")] = None,
    engine: Annotated[
        clients.Engine | None, typer.Option(help="Only this engine's clients.")
    ] = None,
    case: Annotated[cases.Name | None, typer.Option(help="Only these clients.")] = None,
    out: Out = OUT,
    quick: Quick = False,
    docs: Docs = False,
) -> None:
    """What does MTP cost in each step, and what does it gain for clients?

    floors: the least that a verify step can cost, counted in bytes; nothing is run.
    steps: verify steps of k drafts on the block model, in plain steps; plugin and upstream.
    clients: tokens per second through HTTP, with MTP (adaptive) and without, in both engines;
    --engine and --case choose. SGLang needs `make setup ENGINE=sglang`.

    \b
      checkpoint   the shipped checkpoint, 1 to 48 clients
      long         the block model, 80 % of drafts accepted, short prompts, answers of 256 tokens
      prompts      the same, prompts of 1,000 tokens, answers of 16 to 160
      first-token  the same, time to the first token
      rejected     the block model, no draft accepted, answers of 256 tokens

    Drafts must not change the text: log-probabilities (steps) and answers (clients) are compared
    with those without drafts. If they differ, the command exits with 1 and prints no figure.
    """
    run = Run(__package__, out, quick)
    if engine is None and case is None:
        report.finish(run, lambda: measure(run, part), docs=docs)
    elif part is Name.CLIENTS:
        report.finish(run, lambda: clients.measure(run, engine, case), docs=docs)
    else:
        raise typer.BadParameter("--engine and --case are of --part clients")


if __name__ == "__main__":
    typer.run(main)
