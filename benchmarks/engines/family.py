"""Four layers of Qwen3.6's sizes: vLLM with the plugin and without, one engine at a time.

Two engines of such a model do not fit into 24 GB, so they do not alternate call by call: they start
in turn, twice, and each is measured as soon as it is ready.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.block_model import TINY, four_layers
from benchmarks.engines.steps import SIDES, flags, mean_difference
from benchmarks.report import Record, Run, console
from benchmarks.worker import Worker, started

SIZES = ("Qwen3.6-35B-A3B", "Qwen3.6-27B")
STEPS, PROMPTS = 24, 3
BATCHES = (1, 8)
PROMPT = 1024
DRAFTS = 3
ORDER = (*SIDES, *SIDES, "drafting")  # as engines start; the last: the plugin with drafts

# Mean, nats. With eight of 256 random experts, near ties decide which: at a smaller size the plugin
# was 0.14 from its fp32, upstream 0.13, and 0.13 from each other. Another model is 1 away.
MAX_DIFFERENCE = 0.2

Times = dict[str, float]  # what was timed → shortest, ms


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and prompts of all rounds; verify steps in plain steps."""
    steps: dict[str, dict[str, float]] = {}
    verify: dict[str, dict[str, float]] = {}
    for size, model in models(run).items():
        times = alternate(run, size, model)
        for what, plugin in times["plugin"].items():
            upstream = times["upstream"][what]
            row = {"upstream": upstream, "plugin": plugin, "upstream / plugin": upstream / plugin}
            steps[f"{size}: {what}"] = row
        for what, step in times["drafting"].items():
            row = {"plugin": step, "in plain steps": step / times["plugin"][what]}
            verify[f"{size}: {what}"] = row
    case = "vLLM, four layers of the released shapes, random weights, bf16, eager"
    yield run.record(
        "engines/family",
        "How fast is Qwen3.6?",
        case,
        dict.fromkeys(SIDES, "ms") | {"upstream / plugin": ""},
        steps,
    )
    yield run.record(
        "engines/family_verify",
        f"What does it cost to draft and verify {DRAFTS} tokens?",
        case,
        {"plugin": "ms", "in plain steps": ""},
        verify,
    )


def models(run: Run) -> dict[str, Path]:
    """The models by size; a quick run has the shipped checkpoint instead."""
    if run.quick:
        return {"the shipped checkpoint": TINY}
    return {size: four_layers(run.out / size, size) for size in SIZES}


def alternate(run: Run, size: str, model: Path) -> dict[str, Times]:
    """Shortest times of each engine, started in turn; raises if they compute different results."""
    found: dict[str, Times] = {}
    exact: list[float] = []
    for name in ORDER:
        with start(run, model, name) as engine:
            logprobs = engine.logprobs()
            exact = exact or logprobs
            difference = mean_difference(exact, logprobs, MAX_DIFFERENCE)
            console.print(f"{size}, {name}: log-probabilities differ by {difference:.4f}")
            new = timed(engine, prefill=name in SIDES)
        old = found.get(name, new)
        found[name] = {what: min(old[what], new[what]) for what in new}
    return found


def start(run: Run, model: Path, name: str) -> AbstractContextManager[Worker]:
    """One engine, in a context; drafts have a fixed length."""
    more: dict[str, Any] = {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 29}
    if name == "drafting":
        more["speculative_config"] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    asked = flags(model, quick=run.quick, enforce_eager=True) | more
    log = run.out / f"family-{model.name}-{name}.log"
    return started(Worker(name, asked, log, plugin=name != "upstream", drafts="fixed"))


def timed(engine: Worker, *, prefill: bool) -> Times:
    """Milliseconds of an engine's shortest steps and its fastest prompt."""
    times = {
        f"decode, batch {batch}": min(engine.call("decode", batch=batch, steps=STEPS))
        for batch in BATCHES
    }
    if prefill:
        rates = [engine.call("prefill", tokens=PROMPT) for _ in range(PROMPTS)]
        times[f"prompt of {PROMPT:,} tokens"] = 1e3 * PROMPT / max(rates)
    return times
