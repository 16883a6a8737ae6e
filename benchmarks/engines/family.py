"""Four layers of Qwen3.6's sizes: vLLM with the plugin and without, called in turn.

The vocabulary is cut as the layers are: the head has its released share of a step, and two engines
fit into 24 GB.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from benchmarks.block_model import TINY, four_layers
from benchmarks.engines.steps import SIDES, flags, mean_difference
from benchmarks.report import Record, Run, console
from benchmarks.worker import FIXED, Worker, alternate, started

SIZES = ("Qwen3.6-35B-A3B", "Qwen3.6-27B")
ROUNDS, STEPS = 5, 16
BATCHES = (1, 8)
PROMPT = 1024
DRAFTS = 3

# Mean, nats. With eight of 256 random experts, near ties decide which: at a smaller size the plugin
# was 0.14 from its fp32, upstream 0.13, and 0.13 from each other. Another model is 1 away.
MAX_DIFFERENCE = 0.2

Times = dict[str, dict[str, float]]  # what was timed → engine → shortest, ms


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and prompts of all rounds; verify steps in plain steps."""
    steps: dict[str, dict[str, float]] = {}
    verify: dict[str, dict[str, float]] = {}
    for size, model in models(run).items():
        for what, row in timed(run, size, model, SIDES).items():
            ratio = row["upstream"] / row["plugin"]
            steps[f"{size}: {what}"] = row | {"upstream / plugin": ratio}
        for what, row in timed(run, size, model, ("plugin", "drafting")).items():
            ratio = row["drafting"] / row["plugin"]
            verify[f"{size}: {what}"] = {"plugin": row["drafting"], "in plain steps": ratio}
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


def timed(run: Run, size: str, model: Path, names: tuple[str, str]) -> Times:
    """Shortest times of two engines; raises if they compute different results."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(start(run, model, name)) for name in names}
        difference = mean_difference(
            *(engine.logprobs() for engine in engines.values()), MAX_DIFFERENCE
        )
        console.print(f"{size}, {' and '.join(names)}: differ by {difference:.4f}")
        times: Times = {}
        for batch in BATCHES:
            found = alternate(engines, ROUNDS, "decode", batch=batch, steps=STEPS)
            times[f"decode, batch {batch}"] = {
                name: min(min(steps) for steps in rounds) for name, rounds in found.items()
            }
        if "drafting" not in names:
            found = alternate(engines, ROUNDS, "prefill", tokens=PROMPT)
            times[f"prompt of {PROMPT:,} tokens"] = {
                name: 1e3 * PROMPT / max(rates) for name, rates in found.items()
            }
    return times


def start(run: Run, model: Path, name: str) -> AbstractContextManager[Worker]:
    """One engine, in a context; drafts have a fixed length."""
    more: dict[str, Any] = {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 29}
    if name == "drafting":
        more["speculative_config"] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    asked = flags(model, quick=run.quick, enforce_eager=True) | more
    log = run.out / f"family-{model.name}-{name}.log"
    return started(Worker(name, asked, log, plugin=name != "upstream", env=FIXED))
