"""What MTP costs a step of the block model: verify steps in plain steps of the same side."""

import math
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager

from benchmarks.block_model import model_of
from benchmarks.engines.steps import SIDES, flags
from benchmarks.mtp.floors import BLOCK
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.worker import FIXED, Worker, alternate, started

Floats = dict[str, dict[str, float]]

BATCHES, DRAFTS = (1, 8), (1, 2, 3)
MEMORY_DRAFTS = 2  # tokens drafted by the engines whose memory is compared
FARTHER = 1.25  # times the plain upstream engine's distance from fp32, at most
UNITS = {
    "upstream step": "ms", "upstream": "plain steps",
    "plugin step": "ms", "plugin": "plain steps",
    "floor": "plain steps",
}  # fmt: skip


def measure(run: Run) -> Iterator[Record]:
    """Two engines at a time: a plain one, and one that drafts."""
    rounds, steps = (1, 8) if run.quick else (5, 16)
    drafts = (MEMORY_DRAFTS,) if run.quick else DRAFTS
    verify: Floats = {f"k = {k}, batch {batch}": {} for k in drafts for batch in BATCHES}
    peaks: dict[str, float] = {}
    with start(run, "plugin", 0, dtype="float32") as exact:
        noise = Noise(exact.logprobs())
    for side in SIDES:
        with start(run, side, 0) as plain:
            noise.check(f"{side}, plain", plain.logprobs())
            for k in drafts:
                with start(run, side, k) as drafting:
                    noise.check(f"{side}, k = {k}", drafting.logprobs())
                    for batch in BATCHES:
                        row = over_plain(side, plain, drafting, batch, rounds, steps)
                        verify[f"k = {k}, batch {batch}"] |= row
                    if k == MEMORY_DRAFTS:
                        peaks[side] = drafting.call("peak_memory")
    yield from records(run, verify, peaks)


def records(run: Run, verify: Floats, peaks: dict[str, float]) -> Iterator[Record]:
    case = f"vLLM, {model_of(run)[1]}, bf16, eager"
    units = dict(UNITS)
    if run.quick:  # the floors are counted for the block model
        units = {name: unit for name, unit in UNITS.items() if name != "floor"}
    else:
        for k in DRAFTS:
            for batch in BATCHES:
                verify[f"k = {k}, batch {batch}"]["floor"] = BLOCK.over_plain(k, batch)
    yield run.record(
        "mtp/steps", "What does a verify step cost, drafting included?", case, units, verify
    )
    yield run.record(
        "mtp/memory",
        "How much memory at the peak?",
        case,
        dict.fromkeys(SIDES, "GB") | {"plugin / upstream": ""},
        {
            f"resident memory, k = {MEMORY_DRAFTS}": peaks
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


def start(run: Run, side: str, k: int, **more: str) -> AbstractContextManager[Worker]:
    """An engine that drafts k tokens, or none; in a context."""
    model, _ = model_of(run)
    mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": k}} if k else {}
    asked = flags(model, quick=run.quick, enforce_eager=True, **mtp, **more)
    log = run.out / f"mtp-{side}-{k}.log"
    worker = Worker(f"{side}, k = {k}", asked, log, plugin=side == "plugin", env=FIXED)
    return started(worker)


def over_plain(
    side: str, plain: Worker, drafting: Worker, batch: int, rounds: int, steps: int
) -> dict[str, float]:
    """The shortest step with drafts, drafting included, over the shortest plain one."""
    pair = {"plain": plain, "drafting": drafting}
    times = alternate(pair, rounds, "decode", batch=batch, steps=steps)
    shortest = {name: min(t for round_ in found for t in round_) for name, found in times.items()}
    return {
        f"{side} step": shortest["drafting"],
        side: shortest["drafting"] / shortest["plain"],
    }
