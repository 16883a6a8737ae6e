"""`make bench`: every question in turn; figures go to out/bench.json and docs/performance.md."""

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import engines, kernels, report, startup
from benchmarks.block_model import block_model

TINY = Path("examples/qwen3next-tiny")


def main(
    out: Annotated[Path, typer.Option(help="Where models, logs and figures go.")] = Path("out"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds, and no compiled engines.")] = False,
    docs: Annotated[bool, typer.Option(help="Write docs/performance.md.")] = True,
) -> None:
    """Measure plugin against upstream, alternating; stops on a red check without a number."""
    out.mkdir(exist_ok=True)
    results = {
        "machine": report.machine(),
        "kernels": kernels.measure(),
        "engines": engines.measure(block_model(out / "block-model"), out, quick=quick),
        "startup": startup.start_up_times(TINY, out, rounds=1 if quick else 3),
    }
    path = out / "bench.json"
    path.write_text(json.dumps(results, indent=2))
    for part in ("kernels", "engines"):
        print(report.markdown(results[part]))
    print(report.markdown({"until ready": results["startup"]}))
    if docs:
        report.write(path)


if __name__ == "__main__":
    typer.run(main)
