"""What MTP costs a step of the block model: verify steps in plain steps of the same side."""

import math
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.block_model import block_model
from benchmarks.engines.steps import BATCHES, SIDES, Times, flags, timed
from benchmarks.mtp.floors import BLOCK
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.worker import FIXED, Worker, started

DRAFTS = (1, 3)
FARTHER = 1.25  # times the plain upstream engine's distance from fp32, at most
UNITS = {
    "upstream step": "ms", "upstream": "plain steps",
    "plugin step": "ms", "plugin": "plain steps",
    "bytes, at least": "plain steps", "bytes, expected": "plain steps",
}  # fmt: skip


def measure(run: Run) -> Iterator[Record]:
    """Two engines at a time: a plain one, and one that drafts."""
    model = block_model(run.out / "block-model")
    verify: Times = {
        f"draft of {num_drafts}, batch {batch}": {
            "bytes, at least": BLOCK.over_plain(num_drafts, batch),
            "bytes, expected": BLOCK.expected(num_drafts, batch),
        }
        for num_drafts in DRAFTS
        for batch in BATCHES
    }
    peaks: dict[str, float] = {}
    with start(run, model, "plugin", 0, dtype="float32") as exact:
        noise = Noise(exact.logprobs())
    for side in SIDES:
        with start(run, model, side, 0) as plain:
            noise.check(f"{side}, plain", plain.logprobs())
            for num_drafts in DRAFTS:
                with start(run, model, side, num_drafts) as drafting:
                    noise.check(f"{side}, draft of {num_drafts}", drafting.logprobs())
                    found = timed({"plain": plain, "drafting": drafting})
                    for batch, row in zip(BATCHES, found.values(), strict=True):
                        verify[f"draft of {num_drafts}, batch {batch}"] |= {
                            f"{side} step": row["drafting"],
                            side: row["drafting"] / row["plain"],
                        }
                    peaks[side] = drafting.call("peak_memory")
    case = "vLLM, the block model, bf16, eager"
    yield run.record(
        "mtp/steps", "What does a verify step cost, drafting included?", case, UNITS, verify
    )
    yield run.record(
        "mtp/memory",
        "How much memory at the peak, with MTP?",
        case,
        dict.fromkeys(SIDES, "GB") | {"plugin / upstream": ""},
        {
            f"resident memory, draft of {DRAFTS[-1]}": peaks
            | {"plugin / upstream": peaks["plugin"] / peaks["upstream"]}
        },
    )


class Noise:
    """Distances of bf16 engines from fp32; none may be much larger than upstream's."""

    def __init__(self, exact: list[float]) -> None:
        self.exact, self.bound = exact, math.inf

    def check(self, name: str, logprobs: list[float]) -> None:
        """Raises RedCheckError if an engine computes something else."""
        distance = statistics.fmean(abs(a - b) for a, b in zip(self.exact, logprobs, strict=True))
        console.print(f"{name}: log-probabilities are {distance:.4f} from fp32's on average")
        if not distance <= self.bound:
            raise RedCheckError(f"{name}: {distance:.4f} from fp32, over {self.bound:.4f}")
        self.bound = min(self.bound, FARTHER * distance)


def start(
    run: Run, model: Path, side: str, num_drafts: int, **more: str
) -> AbstractContextManager[Worker]:
    """An engine that drafts so many tokens, or none; in a context."""
    mtp = {}
    if num_drafts:
        mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": num_drafts}}
    asked = flags(model, enforce_eager=True, **mtp, **more)
    log = run.out / f"mtp-{side}-{num_drafts}.log"
    worker = Worker(
        f"{side}, draft of {num_drafts}", asked, log, plugin=side == "plugin", env=FIXED
    )
    return started(worker)
