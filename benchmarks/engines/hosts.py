"""The two engines side by side with the plugin in both: steps and prefill, alternating in one run.

Needs both environments: `make setup` and `make setup ENGINE=sglang`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.block_model import block_model
from benchmarks.engines import vllm as engines
from benchmarks.engines.vllm import Side, console

SGLANG_PYTHON = Path(".venv-sglang/bin/python")


def sglang_flags(model: Path) -> dict[str, Any]:
    """SGLang's flags, with vLLM's sizes and no prefix cache on either side."""
    return {
        "model_path": str(model),
        "device": "cpu",
        "context_length": 20000,
        "chunked_prefill_size": 2048,
        "max_total_tokens": 40000,
        "max_running_requests": 16,
        "disable_radix_cache": True,
        "sleep_on_idle": True,  # or it would take a core from the other engine
    }


@contextmanager
def hosts(model: Path, out: Path) -> Iterator[dict[str, Side]]:
    """vLLM, compiled as it is by default, and SGLang."""
    with ExitStack() as stack:
        sides = {
            "vllm": Side("plugin", engines.flags(model), out / "hosts-vllm.log"),
            "sglang": Side(
                "plugin",
                sglang_flags(model),
                out / "hosts-sglang.log",
                python=SGLANG_PYTHON,
                worker="benchmarks.engines.sglang_worker",
            ),
        }
        for name, side in sides.items():
            stack.enter_context(engines.started(name, side))
        yield sides


def measure(model: Path, out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Steps and prefill of both, and SGLang's time over vLLM's."""
    table: dict[str, dict[str, float]] = {}
    rounds, steps = (2, 12) if quick else (5, 16)
    with hosts(model, out) as sides:
        console.print(f"check: log-probabilities differ by {engines.check(sides):.4f} on the mean")
        for batch in (1, 8):
            results = engines.alternate(sides, rounds, "decode", batch=batch, steps=steps)
            shortest = {name: min(map(min, times)) for name, times in results.items()}
            table[f"decode step, batch {batch}"] = _row(shortest, "ms")
        results = engines.alternate(sides, rounds, "prefill", tokens=1024)
        seconds = {name: 1024e3 / max(rates) for name, rates in results.items()}
        table["prefill of 1,024"] = _row(seconds, "ms")
    return table


def _row(times: dict[str, float], unit: str) -> dict[str, float]:
    row = {f"{name} {unit}": value for name, value in times.items()}
    return row | {"ratio": times["sglang"] / times["vllm"]}


def main(
    out: Annotated[Path, typer.Option(help="Where models and logs go.")] = Path("out"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
) -> None:
    """Measure SGLang against vLLM, the plugin in both; stops on a red check without a number."""
    out.mkdir(exist_ok=True)
    print(report.markdown(measure(block_model(out / "block-model"), out, quick=quick)))


if __name__ == "__main__":
    typer.run(main)
