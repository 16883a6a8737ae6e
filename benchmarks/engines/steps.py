"""vLLM with the plugin and without, and SGLang: steps, prompts and memory, called in turn."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.block_model import block_model
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.worker import SGLANG, SGLANG_PYTHON, Worker, alternate, started

SIDES = ("upstream", "plugin")
RATIO = {"upstream / plugin": ""}
ROUNDS, STEPS, BATCHES = 4, 16, (1, 8)
PROMPTS = (1024, 8192)
LONG = 4096  # tokens of prompts that fewer rounds read
# Mean, nats: two bf16 evaluations of one random model. On a Xeon with AMX upstream was 0.088 from
# the plugin's fp32, the plugin's bf16 0.083, and 0.082 from each other.
MAX_LOGPROB_DIFFERENCE = 0.1

Times = dict[str, dict[str, float]]  # what was timed → engine → milliseconds


def measure(run: Run) -> Iterator[Record]:
    """Steps, prompts and peak memory of vLLM, compiled as by default, and of SGLang."""
    model = block_model(run.out / "block-model")
    with ExitStack() as stack:
        engines = {side: stack.enter_context(started(vllm(run, model, side))) for side in SIDES}
        if SGLANG_PYTHON.exists():
            engines["SGLang"] = stack.enter_context(started(sglang(run, model)))
        check(engines)
        times = timed(engines, PROMPTS)
        peaks = {side: engines[side].call("peak_memory") for side in SIDES}
    question, case = "How long do steps and prompts take?", "vLLM compiled, the block model, bf16"
    yield run.record(
        "engines/steps", question, case, dict.fromkeys(SIDES, "ms") | RATIO, with_ratios(times)
    )
    yield run.record(
        "engines/memory",
        "How much memory at the peak?",
        case,
        dict.fromkeys(SIDES, "GB") | {"plugin / upstream": ""},
        {"resident memory": peaks | {"plugin / upstream": peaks["plugin"] / peaks["upstream"]}},
    )
    if "SGLang" in engines:
        yield run.record(
            "engines/hosts",
            "How long do both engines take?",
            case,
            {"vLLM": "ms", "SGLang": "ms", "SGLang / vLLM": ""},
            {
                what: {"vLLM": row["plugin"], "SGLang": row["SGLang"],
                       "SGLang / vLLM": row["SGLang"] / row["plugin"]}
                for what, row in times.items()
            },
        )  # fmt: skip


def flags(model: Path, **more: Any) -> dict[str, Any]:
    """An engine's flags. Prefix caching is off because with MTP upstream dies of it on a CPU."""
    return {
        "model": str(model),
        "max_model_len": 4096,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 1 << 29,
    } | more


def vllm(run: Run, model: Path, side: str) -> Worker:
    asked = flags(model, max_model_len=10000)
    return Worker(side, asked, run.out / f"steps-{side}.log", plugin=side == "plugin")


def sglang(run: Run, model: Path) -> Worker:
    """SGLang with the plugin, with vLLM's sizes and no prefix cache."""
    asked = {
        "model_path": str(model),
        "device": "cpu",
        "context_length": 10000,
        "chunked_prefill_size": 2048,
        "max_total_tokens": 20000,
        "max_running_requests": 16,
        "disable_radix_cache": True,
        "sleep_on_idle": True,  # an idle engine that polls takes a core from the others
    }
    return Worker("SGLang", asked, run.out / "steps-sglang.log", module=SGLANG)


def check(
    engines: dict[str, Worker], bounds: dict[str, float] | None = None, than: str = "plugin"
) -> None:
    """Raise unless the engines' log-probabilities are within bounds of those of one of them."""
    logprobs = {name: engine.logprobs() for name, engine in engines.items()}
    for name, found in logprobs.items():
        bound = (bounds or {}).get(name, MAX_LOGPROB_DIFFERENCE)
        difference = mean_difference(logprobs[than], found, bound)
        console.print(f"check: {name}'s log-probabilities differ by {difference:.4f}")


def mean_difference(
    left: Sequence[float], right: Sequence[float], bound: float = MAX_LOGPROB_DIFFERENCE
) -> float:
    """Mean difference of log-probabilities; raises if it is more than noise."""
    mean = statistics.fmean(abs(a - b) for a, b in zip(left, right, strict=True))
    if not mean <= bound:
        raise RedCheckError(f"prompt log-probabilities differ by {mean:.4f} on average")
    return mean


def timed(engines: dict[str, Worker], prompts: Sequence[int] = ()) -> Times:
    """Shortest steps and prompts of all rounds, because other work only adds time."""
    rows: Times = {}
    for batch in BATCHES:
        found = alternate(engines, ROUNDS, "decode", batch=batch, steps=STEPS)
        shortest = {name: min(map(min, times)) for name, times in found.items()}
        rows[f"decode, batch {batch}"] = shortest
    for tokens in prompts:
        rounds = ROUNDS if tokens < LONG else ROUNDS // 2
        found = alternate(engines, rounds, "prefill", tokens=tokens)
        rows[f"prompt of {tokens:,} tokens"] = {name: min(times) for name, times in found.items()}
    return rows


def with_ratios(times: Times) -> Times:
    """Both sides, and how many times as fast the plugin is."""
    return {
        what: {side: row[side] for side in SIDES}
        | {"upstream / plugin": row["upstream"] / row["plugin"]}
        for what, row in times.items()
    }
