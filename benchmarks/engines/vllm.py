"""Plugin and upstream side by side: steps, prefill and memory, alternating in one run."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

console = Console(stderr=True)
SIDES = ("upstream", "plugin")
MAX_LOGPROB_DIFFERENCE = 0.08  # mean, nats: two bf16 evaluations of one random model


class RedCheckError(RuntimeError):
    """The two sides do not compute the same thing; no number is printed."""


class Side:
    """A worker process that serves the block model on one side."""

    def __init__(
        self,
        side: str,
        flags: dict[str, Any],
        log: Path,
        drafts: str = "adaptive",
        *,
        python: Path = Path(sys.executable),
        worker: str = "benchmarks.engines.vllm_worker",
    ) -> None:
        self.side = side
        env = os.environ | {
            "QWEN3NEXT_DISABLE": str(int(side == "upstream")),
            "QWEN3NEXT_DRAFTS": drafts,
        }
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [str(python), "-m", worker, json.dumps(flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            text=True,
        )

    def answer(self) -> Any:
        """Wait for the worker's next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.side} worker died: see {self.log.name}")
        return json.loads(line)["result"]

    def call(self, name: str, **arguments: Any) -> Any:
        """Ask the worker, and wait."""
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        """End the worker."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def flags(model: Path, **more: Any) -> dict[str, Any]:
    """An engine's flags; prefix caching is off: with MTP upstream would die of it."""
    return {
        "model": str(model),
        "max_model_len": 20000,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 30,
    } | more


@contextmanager
def started(name: str, side: Side) -> Iterator[Side]:
    """A side from when it is ready; one after the other: pages that two map are not given back."""
    try:
        with console.status(f"starting {name}"):
            side.answer()
        yield side
    finally:
        side.stop()


@contextmanager
def both(model: Path, out: Path, name: str, **more: Any) -> Iterator[dict[str, Side]]:
    """Both sides with the same flags."""
    with ExitStack() as stack:
        sides = {}
        for side in SIDES:
            process = Side(side, flags(model, **more), out / f"{name}-{side}.log")
            sides[side] = stack.enter_context(started(f"{name}, {side}", process))
        yield sides


def logprobs(side: Side) -> list[float]:
    """Log-probabilities of the prompts that all sides share."""
    return [x for prompt in side.call("logprobs", lengths=[3, 65, 200]) for x in prompt]


def check(sides: dict[str, Side]) -> float:
    """Mean difference of the two sides' log-probabilities; raises where it is no noise."""
    left, right = (logprobs(side) for side in sides.values())
    mean = statistics.fmean(abs(a - b) for a, b in zip(left, right, strict=True))
    if not mean <= MAX_LOGPROB_DIFFERENCE:
        raise RedCheckError(f"prompt log-probabilities differ by {mean:.4f} on the mean")
    return mean


def alternate(sides: dict[str, Side], rounds: int, call: str, **arguments: Any) -> dict[str, list]:
    """Call both sides in turn, `rounds` times."""
    results: dict[str, list] = {name: [] for name in sides}
    with console.status(f"{call} {arguments}"):
        for _ in range(rounds):
            for name, side in sides.items():
                results[name].append(side.call(call, **arguments))
    return results


def step_times(sides: dict[str, Side], batch: int, rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds of the shortest and the median step of each side; ratio of the shortest."""
    results = alternate(sides, rounds, "decode", batch=batch, steps=steps)
    row: dict[str, float] = {}
    for name, times in results.items():
        flat = [t for round_ in times for t in round_]
        row[f"{name} min ms"], row[f"{name} ms"] = min(flat), statistics.median(flat)
    row["ratio"] = row["upstream min ms"] / row["plugin min ms"]
    return row


def prefill_rates(sides: dict[str, Side], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each side, the best of the rounds, and their ratio."""
    results = alternate(sides, rounds, "prefill", tokens=tokens)
    row = {f"{name} tok/s": max(rates) for name, rates in results.items()}
    row["ratio"] = row["plugin tok/s"] / row["upstream tok/s"]
    return row


def measure(model: Path, out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """All engine figures; `quick` takes fewer rounds and leaves out the compiled engines."""
    table: dict[str, dict[str, float]] = {}
    rounds, steps = (3, 12) if quick else (5, 16)
    with both(model, out, "eager", enforce_eager=True) as sides:
        console.print(f"check: log-probabilities differ by {check(sides):.4f} on the mean")
        for batch in (1, 8):
            table[f"decode step, batch {batch}, eager"] = step_times(sides, batch, rounds, steps)
        table["prefill 1k, eager"] = prefill_rates(sides, 1024, rounds)
        table["prefill 16k, eager"] = prefill_rates(sides, 16384, 1)
        table["peak memory"] = memory(sides)
    if not quick:
        with both(model, out, "compiled") as sides:
            check(sides)
            for batch in (1, 8):
                table[f"decode step, batch {batch}, compiled"] = step_times(
                    sides, batch, rounds, steps
                )
    return table


def memory(sides: dict[str, Side]) -> dict[str, float]:
    """GB of each side's peak resident memory, and the plugin's over upstream's."""
    row = {f"{name} GB": side.call("peak_memory") for name, side in sides.items()}
    row["ratio"] = row["plugin GB"] / row["upstream GB"]
    return row
