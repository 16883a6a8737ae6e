"""Metrics of steps and drafts in vLLM's Prometheus registry: GET /metrics, LLM.get_metrics().

vLLM's statistics structures have no room for ours, and its stat-logger plugins would turn
statistics on for every model. So worker and scheduler write to a board in shared memory
(mtp/metrics.py), and a collector of the registry reads it on request.
"""

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from math import isnan
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.metrics.prometheus import get_prometheus_registry

from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.mtp.metrics import Board, Metric, attach, create, metrics

logger = init_logger(LOGGER)

PREFIX = "vllm:qwen3next_"  # LLM.get_metrics() shows only names that begin with vllm:
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # vLLM sets it for several API servers


def board_path(vllm_config: VllmConfig, engine: int) -> Path:
    """The file of a data-parallel engine's board; all of its processes use the same name."""
    if shared := os.environ.get(SHARED):  # each API server has an instance_id of its own
        return Path(shared, f"qwen3next-metrics-{engine}")
    # Not tempfile's choice, which each process makes anew when a folder cannot be written.
    folder = os.environ.get("TMPDIR") or "/tmp"
    return Path(folder, f"qwen3next-metrics-{vllm_config.instance_id}-{engine}")


def worker_board(vllm_config: VllmConfig) -> Board:
    """The board that this rank writes to. Other processes read only the first rank's.

    If its file cannot be written, the board is private, and the log says so.
    """
    num_drafts = vllm_config.num_speculative_tokens
    if get_tp_group().rank_in_group != 0:
        return Board(num_drafts)
    return _new_board(vllm_config)


def scheduler_board(vllm_config: VllmConfig) -> Board:
    """The first rank's board, or a private one if that rank is on another machine.

    Without drafts no rank has a board, so this makes one.
    """
    num_drafts = vllm_config.num_speculative_tokens
    if not num_drafts:
        return _new_board(vllm_config)
    engine = vllm_config.parallel_config.data_parallel_index
    return attach(board_path(vllm_config, engine), num_drafts) or Board(num_drafts)


def _new_board(vllm_config: VllmConfig) -> Board:
    num_drafts = vllm_config.num_speculative_tokens
    path = board_path(vllm_config, vllm_config.parallel_config.data_parallel_index)
    _delete(path)  # of an earlier server, in a folder that the user names
    try:
        return create(path, num_drafts)
    except OSError as error:
        logger.warning(
            "There are no metrics of the plugin: %s cannot be written (%s). Free some space there, "
            "or set TMPDIR to another folder",
            *(path, error.strerror),
        )
        return Board(num_drafts)


class MetricsCollector(Collector):
    """Reads the boards of this server's engines whenever the registry is read."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        parallel_config = vllm_config.parallel_config
        first, count = parallel_config.data_parallel_index, parallel_config.data_parallel_size_local
        self.paths = {n: board_path(vllm_config, n) for n in range(first, first + count)}
        self.num_drafts = vllm_config.num_speculative_tokens
        self.model = str(vllm_config.model_config.served_model_name)
        self.boards: dict[int, Board] = {}

    def describe(self) -> Iterator[Family]:
        """Names only; otherwise the registry would call `collect` on files of an earlier server."""
        for metric in metrics(self.num_drafts):
            yield family(metric, self.model, {})

    def collect(self) -> Iterator[Family]:
        for engine, path in self.paths.items():
            if engine not in self.boards and (board := attach(path, self.num_drafts)):
                self.boards[engine] = board
                if SHARED not in os.environ:
                    _delete(path)
        for metric in metrics(self.num_drafts):
            yield family(metric, self.model, self.boards)

    def clear(self) -> None:
        """Delete the files. Processes that have mapped them keep the memory."""
        if SHARED not in os.environ:
            for path in self.paths.values():
                _delete(path)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # the folder may be one that cannot be written
        path.unlink()


def family(metric: Metric, model: str, boards: Mapping[int, Board]) -> Family:
    """A metric with all samples of each engine."""
    names = ["model_name", "engine"]
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(PREFIX + metric.name, metric.help, labels=names)
        for engine, board in boards.items():
            histogram.add_metric([model, str(engine)], *_buckets(board.read(metric.name)))
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    names += [metric.label] if metric.label else []
    found = kind(PREFIX + metric.name, metric.help, labels=names)
    for engine, board in boards.items():
        own = [model, str(engine)]
        for value, number in board.read(metric.name).items():
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
    """Serve these engines' metrics, and drop those of earlier ones."""
    global _installed
    remove()
    _installed = MetricsCollector(vllm_config)
    REGISTRY.register(_installed)
    atexit.register(_installed.clear)


@patch(
    When.IN_SERVER,
    "vllm.entrypoints.serve.instrumentator.metrics.attach_router",
    reason="with several API servers, the default under data parallelism, GET /metrics shows "
    "only what prometheus_client's own metrics write to files",
    remove_when="vLLM lets a plugin add a collector",
)
def serve_with_ours(host: Callable[[Any], None], app: Any) -> None:
    """Around `attach_router`, whose page for several API servers would lack our metrics."""
    if SHARED in os.environ and _installed is not None:
        app.add_route("/metrics", _page)  # is asked before the host's
    host(app)


def _page(_: Any) -> Any:
    from fastapi import Response  # not in every worker

    registry = get_prometheus_registry()  # a new one, which reads vLLM's files
    registry.register(_installed)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def remove() -> None:
    """Stop serving the metrics of earlier engines."""
    global _installed
    if _installed is not None:
        REGISTRY.unregister(_installed)
        _installed.clear()
        _installed = None
