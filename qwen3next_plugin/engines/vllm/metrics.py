"""Figures of drafting in vLLM's Prometheus registry, for GET /metrics and LLM.get_metrics().

vLLM's own statistics travel from worker to API server in dataclasses that have no room for ours,
and its stat-logger plugins would switch statistics on for every model, asked for or not. So worker
and scheduler write to a board in shared memory (mtp/metrics.py), and a collector, which is the
registry's own way to be extended, reads it when it is asked.
"""

import atexit
import tempfile
from collections.abc import Iterator
from math import isnan
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from qwen3next_plugin.mtp.metrics import Board, Figure, attach, create, figures

PREFIX = "vllm:qwen3next_"  # LLM.get_metrics() shows what begins with vllm: and nothing else


def board_path(vllm_config: VllmConfig) -> Path:
    """Where the board of this engine lies; one name in all of its processes."""
    return Path(tempfile.gettempdir(), f"qwen3next-figures-{vllm_config.instance_id}")


def of_worker(vllm_config: VllmConfig) -> Board:
    """The board to write to: the first rank's is read, the others' are their own."""
    k = vllm_config.num_speculative_tokens
    if get_tp_group().rank_in_group != 0:
        return Board(k)
    return create(board_path(vllm_config), k)


def of_scheduler(vllm_config: VllmConfig) -> Board:
    """The board that the worker made; one of its own where the worker is on another machine."""
    k = vllm_config.num_speculative_tokens
    return attach(board_path(vllm_config), k) or Board(k)


class Figures(Collector):
    """Reads a board whenever the registry is read."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.path = board_path(vllm_config)
        self.k = vllm_config.num_speculative_tokens
        self.labels = {"model_name": str(vllm_config.model_config.served_model_name), "engine": "0"}
        self.board: Board | None = None

    def collect(self) -> Iterator[Metric]:
        if self.board is None:
            self.board = attach(self.path, self.k)
            self.clear()
        for figure in figures(self.k):
            yield family(figure, self.labels, self.board)

    def clear(self) -> None:
        """Take the file away: whoever has opened it keeps it, and nothing is left behind."""
        self.path.unlink(missing_ok=True)


def family(figure: Figure, labels: dict[str, str], board: Board | None) -> Metric:
    """A figure with all its samples; without any where there is no board."""
    names, own = list(labels), list(labels.values())
    if figure.kind == "histogram":
        histogram = HistogramMetricFamily(PREFIX + figure.name, figure.help, labels=names)
        if board:
            histogram.add_metric(own, *_buckets(board.read(figure.name)))
        return histogram
    kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
    names += [figure.label] if figure.label else []
    metric = kind(PREFIX + figure.name, figure.help, labels=names)
    for value, number in board.read(figure.name).items() if board else ():
        if not isnan(number):  # what is not known yet
            metric.add_metric([*own, value] if figure.label else own, number)
    return metric


def _buckets(counts: dict[str, float]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts by upper bound, and the sum of what was counted."""
    buckets, total = [], 0.0
    for bound, count in counts.items():
        total += count
        buckets.append((f"{bound}.0", total))
    return [*buckets, ("+Inf", total)], sum(int(n) * count for n, count in counts.items())


_installed: Figures | None = None


def install(vllm_config: VllmConfig) -> None:
    """Serve the figures of the engine that is configured now."""
    global _installed
    remove()
    _installed = Figures(vllm_config)
    REGISTRY.register(_installed)
    atexit.register(_installed.clear)


def remove() -> None:
    """Serve no figures of an earlier engine."""
    global _installed
    if _installed is not None:
        REGISTRY.unregister(_installed)
        _installed.clear()
        _installed = None
