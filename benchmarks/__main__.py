"""`make bench`: every question in turn; figures go to out/bench.json and docs/."""

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report, report_mtp
from benchmarks.block_model import block_model
from benchmarks.engines import startup
from benchmarks.engines import vllm as engines
from benchmarks.kernels import __main__ as kernels
from benchmarks.mtp import __main__ as mtp
from benchmarks.mtp import vllm_clients as clients

TINY = Path("examples/qwen3next-tiny")


def main(
    out: Annotated[Path, typer.Option(help="Where models, logs and figures go.")] = Path("out"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds, and no compiled engines.")] = False,
    docs: Annotated[bool, typer.Option(help="Write the figures of docs/.")] = True,
) -> None:
    """Measure plugin against upstream, alternating; stops on a red check without a number."""
    out.mkdir(exist_ok=True)
    model = block_model(out / "block-model")
    results = {
        "machine": report.machine(),
        "kernels": kernels.measure(),
        "engines": engines.measure(model, out, quick=quick),
        "steps": mtp.measure(model, out, quick=quick),
        "clients": clients.measure(TINY, out, quick=quick),
        "startup": startup.start_up_times(TINY, out, rounds=1 if quick else 3),
    }
    path = out / "bench.json"
    path.write_text(json.dumps(results, indent=2))
    for part in ("kernels", "engines", "steps", "clients"):
        print(report.markdown(results[part]))
    print(report.markdown({"until ready": results["startup"]}))
    if docs:
        report.write(path)
        report_mtp.write(results)


if __name__ == "__main__":
    typer.run(main)
