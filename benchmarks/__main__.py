"""`python -m benchmarks`, which is `make bench`: engines, kernels and MTP, one after the other."""

from collections.abc import Iterator
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.engines import __main__ as engines
from benchmarks.kernels import __main__ as kernels
from benchmarks.mtp import __main__ as mtp
from benchmarks.report import OUT, Out, Quick, Record, Run


def measure(run: Run) -> Iterator[Record]:
    """Every question that this machine can answer; on a GPU, `benchmarks.gpu` has more."""
    for folder in (kernels, engines, mtp):
        yield from folder.measure(run)


def main(
    out: Out = OUT,
    quick: Quick = False,
    docs: Annotated[
        bool, typer.Option(help="Rewrite the figures of docs/ from this run, unless it is quick.")
    ] = True,
) -> None:
    """Measure the plugin: engines, kernels, and multi-token prediction.

    Each folder also runs alone, and part by part; its --help says what it measures:

    \b
      python -m benchmarks.engines   steps, prefill, memory, start-up; vLLM and SGLang
      python -m benchmarks.kernels   the CPU kernels against upstream's operators
      python -m benchmarks.mtp       verify steps, and clients with drafts and without
      python -m benchmarks.gpu       the Triton kernels; needs a GPU (not run here)
      python -m benchmarks.claim     Qwen3-Next against Qwen3-32B, in blocks (not run here)
      python -m benchmarks.peers     against llama.cpp and others, which it says how to build

    Plugin and upstream are called in turn, and both must compute the same: on a red check the
    command exits with 1 and prints no figure. Every answer is kept as a JSON record in the output
    folder; `python -m benchmarks.render` writes docs/ from the records of full runs.

    A full run takes long and needs an otherwise idle machine. --quick is a smoke test: it uses
    small models and few rounds, and leaves out start-up, steps with MTP, and SGLang. Its figures
    never reach docs/.
    """
    run = Run(__package__, out, quick)
    report.finish(run, lambda: measure(run), docs=docs)


if __name__ == "__main__":
    typer.run(main)
