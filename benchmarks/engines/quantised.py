"""vLLM with the plugin on the block model in bf16, and quantised as it loads."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.block_model import block_model
from benchmarks.engines.steps import check, flags, timed
from benchmarks.report import Record, Run
from benchmarks.worker import Worker, started

# Mean, nats, from bf16. Measured: int8 0.16, int4 0.63; random weights suffer more than trained
# ones.
MAX_DIFFERENCE = {"int8": 0.25, "int4": 0.8}
KINDS = ("bf16", *MAX_DIFFERENCE)


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and prompts of all rounds, and memory."""
    asked = flags(block_model(run.out / "block-model"), enforce_eager=True)
    with ExitStack() as stack:
        engines = {}
        for kind in KINDS:
            env = {} if kind == "bf16" else {"QWEN3NEXT_QUANTISE": kind}
            worker = Worker(kind, asked, run.out / f"quantised-{kind}.log", env=env)
            engines[kind] = stack.enter_context(started(worker))
        check(engines, MAX_DIFFERENCE, "bf16")
        times = timed(engines, (1024,))
        peaks = {kind: engine.call("peak_memory") for kind, engine in engines.items()}
    case = "vLLM with the plugin, the block model, eager"
    yield run.record(
        "engines/quantised",
        "How long do steps and prompts take, quantised?",
        case,
        dict.fromkeys(KINDS, "ms"),
        times,
    )
    yield run.record(
        "engines/quantised_memory",
        "How much memory at the peak, quantised?",
        case,
        dict.fromkeys(KINDS, "GB"),
        {"resident memory": peaks},
    )
