"""vLLM with the plugin and without: steps, prefill and memory, alternating in one run."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.block_model import model_of
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.worker import Worker, alternate, started

SIDES = ("upstream", "plugin")
# Mean, nats: two bf16 evaluations of one random model. On a Xeon with AMX upstream was 0.088 from
# the plugin's fp32, the plugin's bf16 0.083, and 0.082 from each other.
MAX_LOGPROB_DIFFERENCE = 0.1
STEP_UNITS = {f"{side}, {which}": "ms" for side in SIDES for which in ("shortest", "median")}


def measure(run: Run) -> Iterator[Record]:
    """Steps, prefill and peak memory; a quick run leaves out long prompts, memory and compiling."""
    model, name = model_of(run)
    rounds, steps = (2, 12) if run.quick else (5, 16)
    times: dict[str, dict[str, float]] = {}
    prefill: dict[str, dict[str, float]] = {}
    with both(run, model, "eager", enforce_eager=True) as sides:
        difference = check(sides.values())
        console.print(f"check: log-probabilities differ by {difference:.4f} on average")
        for batch in (1, 8):
            times[f"decode, batch {batch}, eager"] = step_times(sides, batch, rounds, steps)
        for tokens in (1024,) if run.quick else (1024, 16384):
            prefill[f"{tokens:,} tokens, eager"] = prefill_rates(sides, tokens, rounds)
        peaks = {side: worker.call("peak_memory") for side, worker in sides.items()}
    if not run.quick:
        with both(run, model, "compiled") as sides:
            check(sides.values())
            for batch in (1, 8):
                times[f"decode, batch {batch}, compiled"] = step_times(sides, batch, rounds, steps)
    case = f"vLLM, {name}, bf16"
    yield run.record(
        "engines/steps",
        "How long is a decode step?",
        case,
        STEP_UNITS | {"upstream / plugin": ""},
        times,
    )
    yield run.record(
        "engines/prefill",
        "How fast is a prompt read?",
        case,
        dict.fromkeys(SIDES, "tok/s") | {"plugin / upstream": ""},
        prefill,
    )
    if not run.quick:
        yield run.record(
            "engines/memory",
            "How much memory at the peak?",
            case,
            dict.fromkeys(SIDES, "GB") | {"plugin / upstream": ""},
            {"resident memory": peaks | {"plugin / upstream": peaks["plugin"] / peaks["upstream"]}},
        )


def flags(model: Path, *, quick: bool, **more: Any) -> dict[str, Any]:
    """An engine's flags. Prefix caching is off because with MTP upstream dies of it on a CPU."""
    return {
        "model": str(model),
        "max_model_len": 4096 if quick else 20000,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29 if quick else 1 << 30,
    } | more


@contextmanager
def both(run: Run, model: Path, name: str, **more: Any) -> Iterator[dict[str, Worker]]:
    """Both sides with the same flags; in a quick run they start at the same time."""
    asked = flags(model, quick=run.quick, **more)

    def worker(side: str) -> Worker:
        log = run.out / f"{name}-{side}.log"
        return Worker(f"{side}, {name}", asked, log, plugin=side == "plugin")

    with ExitStack() as stack:
        early = {side: worker(side) for side in SIDES if run.quick}
        yield {
            side: stack.enter_context(started(early.get(side) or worker(side))) for side in SIDES
        }


def check(workers: Iterable[Worker]) -> float:
    """Mean difference of two workers' log-probabilities; raises if it is more than noise."""
    return mean_difference(*(worker.logprobs() for worker in workers))


def mean_difference(
    left: Sequence[float], right: Sequence[float], bound: float = MAX_LOGPROB_DIFFERENCE
) -> float:
    """Mean difference of log-probabilities; raises if it is more than noise."""
    mean = statistics.fmean(abs(a - b) for a, b in zip(left, right, strict=True))
    if not mean <= bound:
        raise RedCheckError(f"prompt log-probabilities differ by {mean:.4f} on average")
    return mean


def step_times(sides: dict[str, Worker], batch: int, rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds of the shortest and the median step of each side; ratio of the shortest."""
    results = alternate(sides, rounds, "decode", batch=batch, steps=steps)
    row: dict[str, float] = {}
    for name, times in results.items():
        flat = [t for round_ in times for t in round_]
        row |= {f"{name}, shortest": min(flat), f"{name}, median": statistics.median(flat)}
    ratio = row["upstream, shortest"] / row["plugin, shortest"]
    return row | {"upstream / plugin": ratio}


def prefill_rates(sides: dict[str, Worker], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second of each side, the best of the rounds, and their ratio."""
    results = alternate(sides, rounds if tokens <= 1024 else 1, "prefill", tokens=tokens)
    row = {name: max(rates) for name, rates in results.items()}
    return row | {"plugin / upstream": row["plugin"] / row["upstream"]}
