"""The steps that a GPU is measured on; each is checked, then timed: a row of the record."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.progress import track

from benchmarks.gpu.baselines import Call, baseline, plain
from benchmarks.gpu.check import agree, check_layer
from benchmarks.gpu.layer import Layer, Turns, Work
from benchmarks.gpu.timing import Roof, layers_beyond_cache, replayed
from benchmarks.report import Cell, console
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.model.state import PageLayout

T = TypeVar("T")
NOT_MEASURED, NOT_SPLIT, DOES_NOT_FIT = "not measured", "not split", "does not fit"
UNITS = {
    "layer": "µs", "moved": "GB/s", "computed": "TFLOP/s", "of the roof": "%",
    "recurrence": "µs", "unsplit": "µs", "baseline": "µs", "baseline / recurrence": "",
}  # fmt: skip
PLAIN = 96  # tokens of a row that the plain loop checks; longer than a chunk


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's linear layers, and the steps they run; `prompts` has lengths by name."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    drafts: tuple[int, ...]
    prompts: dict[str, tuple[int, ...]]

    def layout(self, ranks: int, drafts: int) -> PageLayout:
        """The layout of a rank's page."""
        H, HV = self.heads
        K, V = self.dims
        return PageLayout(H // ranks, HV // ranks, K, V, drafts, self.dtype, torch.float32)

    def works(self, ranks: int) -> Iterator[Work]:
        for drafts in (0, *self.drafts):
            layout = self.layout(ranks, drafts)
            does = f"verify a draft of {drafts}" if drafts else "decode"
            for batch in self.batches:
                yield Work(f"TP {ranks}, {does}, batch {batch}", layout, (drafts + 1,) * batch)
        for name, lengths in self.prompts.items():
            yield Work(f"TP {ranks}, prefill {name}", self.layout(ranks, 0), lengths)


RELEASED = Plan(
    heads=(16, 32),
    dims=(128, 128),
    dtype=torch.bfloat16,
    ranks=(1, 2, 4),
    batches=(1, 16, 64, 256),
    drafts=(1, 2, 3),
    prompts={
        "4k": (4096,),
        "32k": (32768,),
        "256k": (262144,),
        "64 × 1k": (1024,) * 64,
        "8 × 1k": (1024,) * 8,
        "8 × 1k and 8k": (*(1024,) * 8, 8192),
    },
)
SMOKE = Plan(
    heads=(2, 4),
    dims=(16, 24),
    dtype=torch.float32,
    ranks=(2,),
    batches=(3,),
    drafts=(2,),
    prompts={"9 and 70": (9, 70)},
)


def rows(plan: Plan, device: torch.device, roof: Roof | None) -> dict[str, dict[str, Cell]]:
    """A row for each step; without a roof there are no times.

    Raises: AssertionError or RuntimeError on the first red check.
    """
    for ranks in plan.ranks:
        for drafts in (0, *plan.drafts):
            check_layer(f"TP {ranks}, draft of {drafts}", plan.layout(ranks, drafts), device)
    works = [work for ranks in plan.ranks for work in plan.works(ranks)]
    found = {}
    for work in track(works, "steps of a layer", console=console):
        try:
            found[work.name] = row(work, device, roof)
        except torch.OutOfMemoryError:
            found[work.name] = dict.fromkeys(UNITS, DOES_NOT_FIT)
    return found


def row(work: Work, device: torch.device, roof: Roof | None) -> dict[str, Cell]:
    """Check a step on each layer, then time it."""
    turns = Turns(work, layers_beyond_cache(work.bytes(), device), device)
    baselines = []
    for layer, whole in zip(turns.layers, turns.calls(Layer.whole), strict=True):
        if not whole().isfinite().all():
            raise AssertionError(f"{work.name}: the output is not finite")
        baselines.append(checked(work, layer, turns))
    faults.check(device)
    if roof is None:
        return dict.fromkeys(UNITS, NOT_MEASURED)
    took = replayed(turns.calls(Layer.whole), turns.advance)
    recurrence = replayed(turns.calls(Layer.recurrence), turns.advance)
    cells: dict[str, Cell] = dict.fromkeys(UNITS, NOT_MEASURED)
    cells |= {"layer": took * 1e6, "recurrence": recurrence * 1e6, "unsplit": NOT_SPLIT}
    if work.is_split(config_for(device)):
        cells["unsplit"] = replayed(turns.calls(Layer.unsplit), turns.advance) * 1e6
    faults.check(device)
    moved, flops = work.bytes(), work.flops(config_for(device).chunk)
    cells["of the roof"] = 100 * roof.seconds(moved, flops) / took
    if work.prefills:
        cells |= {"computed": flops / took / 1e12, "moved": ""}
    else:
        cells |= {"moved": moved / took / 1e9, "computed": ""}
    calls = [call for call in baselines if call is not None]
    if len(calls) == len(baselines):
        other = tried(work, lambda: replayed(calls, lambda: None))
        if other is not None:
            cells |= {"baseline": other * 1e6, "baseline / recurrence": other / recurrence}
    return cells


def checked(work: Work, layer: Layer, turns: Turns) -> Call | None:
    """Compare the kernels with a plain loop and a baseline; returns the baseline if one runs."""
    dtype, S = work.layout.activation_dtype, layer.settled(turns.context_len)
    out = layer.recurrence(turns.step)
    at, ref = plain(layer, work.lengths, S, min(PLAIN, *work.lengths))
    agree(f"{work.name}, a plain loop", out[at], ref, dtype)
    if work.is_split(config_for(out.device)):
        agree(f"{work.name}, unsplit", out, layer.unsplit(turns.step), dtype)
    other = baseline(work, layer, S)
    theirs = None if other is None else tried(work, other)
    if theirs is None:
        return None
    agree(f"{work.name}, the baseline", theirs, out, dtype)
    return other


def tried(work: Work, call: Callable[[], T]) -> T | None:
    """The result of a baseline's call; None, with a message, if it cannot run here."""
    try:
        return call()
    except Exception as complaint:
        print(f"{work.name}: the baseline does not run: {complaint}", file=sys.stderr)
        return None
