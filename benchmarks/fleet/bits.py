"""What the same bits in any batch, and in any engine, cost: steps and prompts with the switch."""

from collections.abc import Iterator
from contextlib import ExitStack

from benchmarks.block_model import block_model
from benchmarks.engines.steps import check, flags, timed
from benchmarks.report import Record, Run
from benchmarks.worker import Worker, started

SWITCH = "QWEN3NEXT_BATCH_INVARIANT"
BITS, DEFAULT = "same bits", "default"
RATIO = f"{BITS} / {DEFAULT}"


def measure(run: Run) -> Iterator[Record]:
    """Shortest of all rounds, of two engines in turn."""
    asked = flags(block_model(run.out / "block-model"))
    with ExitStack() as stack:
        engines = {}
        for name, value in {DEFAULT: "0", BITS: "1"}.items():
            log = run.out / f"fleet-bits-{value}.log"
            engines[name] = stack.enter_context(
                started(Worker(name, asked, log, env={SWITCH: value}))
            )
        check(engines, than=DEFAULT)
        times = timed(engines, (1024,))
    yield run.record(
        "fleet/bits",
        "What do the same bits in any batch cost?",
        "vLLM, compiled, the block model, bf16",
        {DEFAULT: "ms", BITS: "ms", RATIO: ""},
        {what: row | {RATIO: row[BITS] / row[DEFAULT]} for what, row in times.items()},
    )
