"""Times on a GPU, by CUDA events around replays of a graph, and the card's own limits."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from qwen3next_plugin.kernels.step import GRID

ROUNDS = 5  # a time is the median of these, each the mean of GRID replays
COLD = 512 << 20  # bytes that the layers move between two turns: more than any cache holds
COPIED, SIDE = 1 << 30, 8192  # of the roof: bytes copied, side of the matrices


@dataclass(frozen=True, slots=True)
class Roof:
    """The card's measured limits: bytes and floating-point operations a second."""

    bandwidth: float
    rate: float

    def __str__(self) -> str:
        return (
            f"copy {self.bandwidth / 1e9:,.0f} GB/s, bf16 products {self.rate / 1e12:,.0f} TFLOP/s"
        )

    def seconds(self, moved: float, flops: float) -> float:
        """The least time for so many bytes and operations."""
        return max(moved / self.bandwidth, flops / self.rate)


def roof(device: torch.device) -> Roof:
    """Measure a copy of a large tensor and a large matrix product."""
    source, target = torch.zeros(2, COPIED, dtype=torch.int8, device=device)
    a, b = torch.randn(2, SIDE, SIDE, dtype=torch.bfloat16, device=device)
    copied = seconds(lambda: target.copy_(source))
    return Roof(2 * COPIED / copied, 2 * SIDE**3 / seconds(lambda: a @ b))


def layers_beyond_cache(moved: float, device: torch.device) -> int:
    """How many layers must take turns, each moving `moved` bytes, to find nothing in a cache."""
    return 2 if device.type == "cpu" else ceil(COLD / moved)


def replayed(calls: list[Callable], advance: Callable[[], None]) -> float:
    """Seconds of one call, from a graph that holds all; `advance` runs before each replay."""
    for call in calls:  # compiles and tunes
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return seconds(graph.replay, advance) / len(calls)


def seconds(call: Callable, before: Callable[[], None] = lambda: None) -> float:
    """Seconds of a call on the device: the median of means over GRID calls."""
    call()
    events = []
    for _ in range(ROUNDS * GRID):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    means = [statistics.mean(times[i : i + GRID]) for i in range(0, len(times), GRID)]
    return statistics.median(means)
