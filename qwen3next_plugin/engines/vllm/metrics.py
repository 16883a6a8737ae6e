"""Metrics of drafting in vLLM's Prometheus registry, for GET /metrics and LLM.get_metrics().

vLLM's statistics structures have no room for ours, and its stat-logger plugins would turn
statistics on for every model. So worker and scheduler write to a board in shared memory
(mtp/metrics.py), and a collector of the registry reads it on request.
"""

import atexit
import tempfile
from collections.abc import Iterator
from math import isnan
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group

from qwen3next_plugin.mtp.metrics import Board, Metric, attach, create, metrics

PREFIX = "vllm:qwen3next_"  # LLM.get_metrics() shows only names that begin with vllm:


def board_path(vllm_config: VllmConfig) -> Path:
    """The file of this engine's board; all of its processes use the same name."""
    return Path(tempfile.gettempdir(), f"qwen3next-metrics-{vllm_config.instance_id}")


def worker_board(vllm_config: VllmConfig) -> Board:
    """The board that this rank writes to. Only the first rank's is read by others."""
    num_drafts = vllm_config.num_speculative_tokens
    if get_tp_group().rank_in_group != 0:
        return Board(num_drafts)
    return create(board_path(vllm_config), num_drafts)


def scheduler_board(vllm_config: VllmConfig) -> Board:
    """The first rank's board, or a private one if that rank is on another machine."""
    num_drafts = vllm_config.num_speculative_tokens
    return attach(board_path(vllm_config), num_drafts) or Board(num_drafts)


class MetricsCollector(Collector):
    """Reads the board whenever the registry is read."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.path = board_path(vllm_config)
        self.num_drafts = vllm_config.num_speculative_tokens
        self.labels = {"model_name": str(vllm_config.model_config.served_model_name), "engine": "0"}
        self.board: Board | None = None

    def collect(self) -> Iterator[Family]:
        if self.board is None:
            self.board = attach(self.path, self.num_drafts)
            self.clear()
        for metric in metrics(self.num_drafts):
            yield family(metric, self.labels, self.board)

    def clear(self) -> None:
        """Delete the file. Processes that have mapped it keep the memory."""
        self.path.unlink(missing_ok=True)


def family(metric: Metric, labels: dict[str, str], board: Board | None) -> Family:
    """A metric with all its samples, or with none if there is no board."""
    names, own = list(labels), list(labels.values())
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(PREFIX + metric.name, metric.help, labels=names)
        if board:
            histogram.add_metric(own, *_buckets(board.read(metric.name)))
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    names += [metric.label] if metric.label else []
    found = kind(PREFIX + metric.name, metric.help, labels=names)
    for value, number in board.read(metric.name).items() if board else ():
        if not isnan(number):  # NaN: not known yet
            found.add_metric([*own, value] if metric.label else own, number)
    return found


def _buckets(counts: dict[str, float]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts by upper bound, and the sum of all observed values."""
    buckets, total = [], 0.0
    for bound, count in counts.items():
        total += count
        buckets.append((f"{bound}.0", total))
    return [*buckets, ("+Inf", total)], sum(int(n) * count for n, count in counts.items())


_installed: MetricsCollector | None = None


def install(vllm_config: VllmConfig) -> None:
    """Serve this engine's metrics, and drop those of an earlier one."""
    global _installed
    remove()
    _installed = MetricsCollector(vllm_config)
    REGISTRY.register(_installed)
    atexit.register(_installed.clear)


def remove() -> None:
    """Stop serving the metrics of an earlier engine."""
    global _installed
    if _installed is not None:
        REGISTRY.unregister(_installed)
        _installed.clear()
        _installed = None
