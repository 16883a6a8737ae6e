"""Tokens per second of SGLang on the shipped checkpoint with NEXTN and without, by clients."""

import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.engines.hosts import SGLANG_PYTHON
from benchmarks.engines.startup import Server
from benchmarks.engines.vllm import console
from benchmarks.mtp.vllm_clients import ADAPTIVE, CHECKED, CLIENTS, OFF, check, throughput

TINY = Path("examples/qwen3next-tiny")
NEXTN = ("--speculative-algo", "NEXTN", "--speculative-num-steps", "3")


class SGLang(Server):
    """`sglang.launch_server`."""

    def command(self) -> list[str]:
        launch = [str(SGLANG_PYTHON.absolute()), "-m", "sglang.launch_server"]
        return [*launch, "--model-path", self.model, "--max-total-tokens", "40000"]


def measure(model: Path, out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Both in turn, round after round, each with the same prompts; medians of the rounds."""
    rounds, each, tokens = (3, 4, 96) if quick else (5, 6, 128)
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    with ExitStack() as stack:
        running = {}
        for name, flags in ((OFF, ()), (ADAPTIVE, NEXTN)):
            server = SGLang(model, out / f"sglang-clients-{name}.log", env, *flags)
            with console.status(f"starting {name}"):
                stack.enter_context(server).wait()
            running[name] = server
        same = check(running, CHECKED // 4 if quick else CHECKED)
        console.print(f"check: {min(same.values()):.0%} of the answers are those without drafts")
        table = {}
        for clients in CLIENTS:
            rates = [
                {name: throughput(s, clients, each, tokens) for name, s in running.items()}
                for _ in range(1 + rounds)  # the first round warms up
            ][1:]
            row = {f"{name}, tok/s": statistics.median(r[name] for r in rates) for name in running}
            row["NEXTN over off"] = statistics.median(r[ADAPTIVE] / r[OFF] for r in rates)
            table[f"{clients} client{'s'[: clients > 1]}"] = row
        return table


def main(
    out: Annotated[Path, typer.Option(help="Where logs go.")] = Path("out"),
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
) -> None:
    """Measure SGLang with NEXTN against SGLang without; stops on a red check without a number."""
    out.mkdir(exist_ok=True)
    print(report.markdown(measure(TINY, out, quick=quick)))


if __name__ == "__main__":
    typer.run(main)
