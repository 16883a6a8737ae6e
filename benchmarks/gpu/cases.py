"""The steps that a GPU is measured on, each checked and timed: one row of the table."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.gpu.baselines import Call, baseline, plain
from benchmarks.gpu.check import agree, check_layer
from benchmarks.gpu.layer import Layer, Turns, Work
from benchmarks.gpu.timing import Roof, layers_beyond_cache, replayed
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.model.state import PageLayout

T = TypeVar("T")
NOT_MEASURED, NOT_SPLIT = "not measured", "not split"
COLUMNS = (
    "layer µs", "rate", "of the roof", "recurrence µs", "unsplit µs", "baseline µs",
    "baseline / recurrence",
)  # fmt: skip
PLAIN = 96  # tokens of a row that a plain loop checks: more than a chunk


@dataclass(frozen=True, slots=True)
class Plan:
    """A model's linear layers, and what they are asked; lengths of prompts by name."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    ranks: tuple[int, ...]
    batches: tuple[int, ...]
    drafts: tuple[int, ...]
    prompts: dict[str, tuple[int, ...]]

    def layout(self, ranks: int, drafts: int) -> PageLayout:
        """A rank's page."""
        heads = (count // ranks for count in self.heads)
        return PageLayout(*heads, *self.dims, drafts, self.dtype, torch.float32)

    def works(self, ranks: int) -> Iterator[Work]:
        for drafts in (0, *self.drafts):
            layout = self.layout(ranks, drafts)
            does = f"verify k = {drafts}" if drafts else "decode"
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


def table(plan: Plan, device: torch.device, roof: Roof | None) -> str:
    """The table in Markdown; without a roof there are no times.

    Raises: AssertionError or RuntimeError on the first red check.
    """
    for ranks in plan.ranks:
        for drafts in (0, *plan.drafts):
            check_layer(f"TP {ranks}, k = {drafts}", plan.layout(ranks, drafts), device)
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for ranks in plan.ranks:
        for work in plan.works(ranks):
            try:
                cells = row(work, device, roof)
            except torch.OutOfMemoryError:
                cells = ["does not fit"] * len(COLUMNS)
            lines.append(f"| {work.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def row(work: Work, device: torch.device, roof: Roof | None) -> list[str]:
    """Check a step on each layer, then time it."""
    turns = Turns(work, layers_beyond_cache(work.bytes(), device), device)
    others = []
    for layer, whole in zip(turns.layers, turns.calls(Layer.whole), strict=True):
        if not whole().isfinite().all():
            raise AssertionError(f"{work.name}: the output is not finite")
        others.append(checked(work, layer, turns))
    faults.check(device)
    if roof is None:
        return [NOT_MEASURED] * len(COLUMNS)
    whole = replayed(turns.calls(Layer.whole), turns.advance)
    recurrence = replayed(turns.calls(Layer.recurrence), turns.advance)
    unsplit = NOT_SPLIT
    if work.is_split(config_for(device)):
        unsplit = f"{replayed(turns.calls(Layer.unsplit), turns.advance) * 1e6:,.1f}"
    faults.check(device)
    least = roof.seconds(work.bytes(), flops := work.flops(config_for(device).chunk))
    rate = f"{flops / whole / 1e12:,.0f} TFLOP/s"
    if not work.prefills:
        rate = f"{work.bytes() / whole / 1e9:,.0f} GB/s"
    cells = [f"{whole * 1e6:,.1f}", rate, f"{least / whole:.0%}"]
    cells += [f"{recurrence * 1e6:,.1f}", unsplit]
    other = None if None in others else tried(work, lambda: replayed(others, lambda: None))
    if other is None:
        return [*cells, NOT_MEASURED, NOT_MEASURED]
    return [*cells, f"{other * 1e6:,.1f}", f"{other / recurrence:.2f}"]


def checked(work: Work, layer: Layer, turns: Turns) -> Call | None:
    """A layer's baseline, None if none runs, once it and the kernels give the same."""
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
    """What a baseline gives; where it cannot run here that is said, and the row goes on."""
    try:
        return call()
    except Exception as complaint:
        print(f"{work.name}: the baseline does not run: {complaint}", file=sys.stderr)
        return None
