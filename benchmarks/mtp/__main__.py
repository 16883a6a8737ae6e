"""What MTP costs a step, and what it brings: steps of the block model, clients of a real server.

    python -m benchmarks.mtp [--part steps|clients] [--quick]

Both parts check first that drafts change nothing, and print no number where they do.
"""

import json
import math
import statistics
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report, report_mtp
from benchmarks.block_model import block_model
from benchmarks.engines.vllm import (
    RedCheckError,
    Side,
    alternate,
    console,
    flags,
    logprobs,
    started,
)
from benchmarks.mtp import vllm_clients as clients
from benchmarks.mtp.floors import BLOCK, BLOCK_ALL_ROWS

TINY = Path("examples/qwen3next-tiny")
BATCHES, DRAFTS = (1, 8), (1, 2, 3)
FARTHER = 1.25  # as far from fp32 as the plain upstream engine, at most
VERIFY = "verify step over plain, k = {k}, batch {batch}"
TARGETS = {1: {1: 1.5, 2: 1.9, 3: 2.3}, 8: {1: 1.5, 2: 1.9, 3: 2.2}}  # batch → k → plain steps


class Part(Enum):
    STEPS = "steps"
    CLIENTS = "clients"


def measure(model: Path, out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """Steps with drafts over plain steps of the same side, two engines at a time."""
    rounds, steps = (2, 8) if quick else (5, 16)
    table: dict[str, dict[str, float]] = {}
    with start(model, out, "plugin", 0, "fixed", dtype="float32") as exact:
        noise = Noise(logprobs(exact))
    for side in ("upstream", "plugin"):
        with start(model, out, side, 0, "fixed") as plain:
            noise.check(f"{side}, plain", logprobs(plain))
            for k in DRAFTS:
                with start(model, out, side, k, "fixed") as drafting:
                    noise.check(f"{side}, k = {k}", logprobs(drafting))
                    for batch in BATCHES:
                        row = table.setdefault(
                            f"verify step over plain, k = {k}, batch {batch}", {}
                        )
                        row |= over_plain(side, plain, drafting, batch, rounds, steps)
                    if k == 2:
                        row = table.setdefault("peak memory, MTP k = 2", {})
                        row[f"{side} GB"] = drafting.call("peak_memory")
            if side == "plugin":
                with start(model, out, side, 3, "adaptive") as adaptive:
                    pair = {"off": plain, "adaptive": adaptive}
                    for batch in BATCHES:
                        name = f"adaptive over off, nothing accepted, batch {batch}"
                        table[name] = rates(pair, batch, rounds, 40 if quick else 150)
    for k in DRAFTS:
        for batch in BATCHES:
            row = table[VERIFY.format(k=k, batch=batch)]
            row |= {
                "to reach": TARGETS[batch][k],
                "floor": BLOCK.over_plain(k, batch),
                "floor, all rows drafted": BLOCK_ALL_ROWS.over_plain(k, batch),
            }
    memory = table["peak memory, MTP k = 2"]
    memory["ratio"] = memory["plugin GB"] / memory["upstream GB"]
    return table


class Noise:
    """How far bf16 engines are from fp32: none may be much farther than the first, upstream's."""

    def __init__(self, exact: list[float]) -> None:
        self.exact, self.bound = exact, math.inf

    def check(self, name: str, logprobs: list[float]) -> None:
        """Raises RedCheckError where an engine computes something else."""
        distance = statistics.fmean(abs(a - b) for a, b in zip(self.exact, logprobs, strict=True))
        console.print(f"{name}: log-probabilities are {distance:.4f} from fp32's on the mean")
        if not distance <= self.bound:
            raise RedCheckError(f"{name}: {distance:.4f} from fp32, over {self.bound:.4f}")
        self.bound = min(self.bound, FARTHER * distance)


def start(
    model: Path, out: Path, side: str, k: int, drafts: str, **more: str
) -> AbstractContextManager[Side]:
    """An engine that drafts k tokens, or none; in a context."""
    mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": k}} if k else {}
    log = out / f"mtp-{side}-{k}-{drafts}.log"
    process = Side(side, flags(model, enforce_eager=True, **mtp, **more), log, drafts)
    return started(f"{side}, k = {k}, {drafts}", process)


def over_plain(
    side: str, plain: Side, drafting: Side, batch: int, rounds: int, steps: int
) -> dict[str, float]:
    """The shortest step with drafts, drafting included, over the shortest plain one."""
    pair = {"plain": plain, "drafting": drafting}
    times = alternate(pair, rounds, "decode", batch=batch, steps=steps)
    shortest = {name: min(t for round_ in found for t in round_) for name, found in times.items()}
    return {
        f"{side} plain ms": shortest["plain"],
        f"{side} ms": shortest["drafting"],
        side: shortest["drafting"] / shortest["plain"],
    }


def rates(pair: dict[str, Side], batch: int, rounds: int, steps: int) -> dict[str, float]:
    """Tokens per second of both, and the median ratio of their rounds, after one to warm up."""
    alternate(pair, 1, "rate", batch=batch, steps=steps)
    found = alternate(pair, rounds, "rate", batch=batch, steps=steps)
    ratios = [on / off for off, on in zip(found["off"], found["adaptive"], strict=True)]
    row = {f"{name} tok/s": statistics.median(found[name]) for name in pair}
    return row | {"ratio": statistics.median(ratios)}


def main(
    part: Annotated[Part | None, typer.Option(help="One part alone.")] = None,
    out: Annotated[Path, typer.Option(help="Where models, logs and figures go.")] = Path("out"),
    quick: Annotated[bool, typer.Option(help="Few, short rounds.")] = False,
    docs: Annotated[bool, typer.Option(help="Write the figures of docs/mtp.md.")] = False,
) -> None:
    """Measure, print, and keep the figures in out/mtp.json beside those of the other part."""
    out.mkdir(exist_ok=True)
    path = out / "mtp.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = report.machine()
    if part in (None, Part.STEPS):
        results["steps"] = measure(block_model(out / "block-model"), out, quick=quick)
        print(report.markdown(results["steps"]))
    if part in (None, Part.CLIENTS):
        results["clients"] = clients.measure(TINY, out, quick=quick)
        print(report.markdown(results["clients"]))
    path.write_text(json.dumps(results, indent=2))
    if docs:
        report_mtp.write(results)


if __name__ == "__main__":
    typer.run(main)
