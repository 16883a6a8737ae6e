"""vLLM on the block model in bf16, and quantised as it loads: steps, prompts, memory."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.block_model import model_of
from benchmarks.engines.steps import MAX_LOGPROB_DIFFERENCE, flags, mean_difference
from benchmarks.report import Record, Run, console
from benchmarks.worker import Worker, alternate, started

# Mean, nats, from the plugin's bf16. Measured: int8 0.16, int4 0.63; random weights suffer more
# than trained ones.
MAX_DIFFERENCE = {"upstream": MAX_LOGPROB_DIFFERENCE, "int8": 0.25, "int4": 0.8}
SIDES = ("upstream", "plugin", "int8", "int4")
BATCHES = (1, 8)
PROMPT = 1024


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and prompts of all rounds, all engines called in turn."""
    model, name = model_of(run)
    rounds, steps = (2, 12) if run.quick else (5, 16)
    asked = flags(model, quick=True, enforce_eager=True)  # four engines in memory at once
    rows: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        engines = {}
        for side in SIDES:
            env = {"QWEN3NEXT_QUANTISE": side} if side.startswith("int") else {}
            log = run.out / f"quantised-{side}.log"
            worker = Worker(side, asked, log, plugin=side != "upstream", env=env)
            engines[side] = stack.enter_context(started(worker))
        logprobs = {side: engine.logprobs() for side, engine in engines.items()}
        for side, bound in MAX_DIFFERENCE.items():
            difference = mean_difference(logprobs["plugin"], logprobs[side], bound)
            console.print(f"check: {side}'s log-probabilities differ by {difference:.4f}")
        for batch in BATCHES:
            found = alternate(engines, rounds, "decode", batch=batch, steps=steps)
            rows[f"decode, batch {batch}"] = {
                side: min(min(times) for times in rounds) for side, rounds in found.items()
            }
        found = alternate(engines, rounds, "prefill", tokens=PROMPT)
        rows[f"prompt of {PROMPT:,} tokens"] = {
            side: 1e3 * PROMPT / max(rates) for side, rates in found.items()
        }
        peaks = {side: engine.call("peak_memory") for side, engine in engines.items()}
    case = f"vLLM, {name}, eager; upstream and plugin in bf16"
    yield run.record(
        "engines/quantised",
        "How long do steps and prompts take?",
        case,
        dict.fromkeys(SIDES, "ms"),
        rows,
    )
    yield run.record(
        "engines/quantised_memory",
        "How much memory do they take at the peak?",
        case,
        dict.fromkeys(SIDES, "GB"),
        {"resident memory": peaks},
    )
