"""`python -m benchmarks.engines`: steps, prefill, memory, start-up; vLLM and SGLang."""

from collections.abc import Iterator
from enum import Enum
from typing import Annotated

import typer

from benchmarks import parts, report
from benchmarks.engines import family, hosts, quantised, startup, steps
from benchmarks.report import OUT, Docs, Out, Quick, Record, Run


class Name(Enum):
    STEPS = "steps"
    STARTUP = "startup"
    HOSTS = "hosts"
    FAMILY = "family"
    QUANTISED = "quantised"


PARTS = {
    Name.STEPS: parts.Part(steps.measure),
    Name.STARTUP: parts.Part(startup.measure, in_quick=False),
    Name.HOSTS: parts.Part(hosts.measure, in_quick=False, needs_sglang=True),
    Name.FAMILY: parts.Part(family.measure, in_quick=False),
    Name.QUANTISED: parts.Part(quantised.measure, in_quick=False),
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
    """How fast are the engines, with the plugin and without?

    steps: vLLM with the plugin and without (upstream): decode steps, prefill, peak memory.
    startup: seconds until `vllm serve` is ready, and what the first request costs on top.
    hosts: vLLM and SGLang, both with the plugin; needs `make setup ENGINE=sglang`.
    family: the same of four layers of Qwen3.6's sizes, and what drafts cost.
    quantised: upstream in bf16, the plugin in bf16, int8 and int4.

    The two sides run in processes of their own and are called in turn, so that a slow minute of
    the machine hits both. First their log-probabilities are compared: if they differ by more than
    noise, the command exits with 1 and prints no figure.

    A full run writes models of 3.7 GB and (family) 8 and 4 GB into the output folder, once;
    family needs 18 GB of memory.
    """
    run = Run(__package__, out, quick)
    report.finish(run, lambda: measure(run, part), docs=docs)


if __name__ == "__main__":
    typer.run(main)
