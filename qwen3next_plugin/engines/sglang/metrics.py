"""Metrics of steps and drafts on SGLang's /metrics (with --enable-metrics), and the log line.

SGLang's processes share metrics through files, the multiprocess mode of prometheus_client. The
drafter runs in the scheduler's process and writes to a board (mtp/metrics.py). The reporter copies
changes to those files whenever the drafter processes steps or a request ends; without drafts, after
each step.
"""

from collections.abc import Callable
from math import isnan, nan
from typing import Any

from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.engines.sglang.pacing import turns
from qwen3next_plugin.mtp.loop import Loop
from qwen3next_plugin.mtp.metrics import Board, LogLine, Metric

PREFIX = "sglang:qwen3next_"


class MetricsReporter(SchedulerMetricsReporter):
    """SGLang's reporter with our metrics. `begin` follows its construction."""

    loop: Loop | None  # None: no drafts
    board: Board
    log_line: LogLine | None
    publisher: "MetricsPublisher | None"  # None: SGLang serves no metrics of this rank

    def begin(self, board: Board, loop: Loop | None = None) -> None:
        """Report what the loop writes to `board`, if there is one."""
        self.loop, self.board = loop, board
        self.log_line = LogLine(board) if loop is not None else None
        served = self.current_scheduler_metrics_enabled
        self.publisher = MetricsPublisher(board, self.metrics_collector.labels) if served else None

    def log_batch_result_stats(self, batch: Any, result: Any) -> None:
        """Report as SGLang does after each step, then write metrics and the log line."""
        super().log_batch_result_stats(batch, result)
        loop = self.loop
        if loop is not None and any(request.finished() for request in batch.reqs):
            loop.keep_plain()
        if loop is None or not loop.plain:  # the board has all steps
            self.board.set("state_pages", [self.state_pages()])
            self.board.set("longest_step_seconds", [turns(self.scheduler).longest_seconds])
            if self.publisher is not None:
                self.publisher.publish()
        if batch.forward_mode.is_decode():
            self._log()

    def report_decode_stats(
        self, can_run_cuda_graph: bool, running_batch: Any = None, num_generated_tokens: int = 0
    ) -> None:
        """Report as SGLang does; count a step without drafts as a verification of 0 drafts."""
        if running_batch.spec_algorithm.is_none():
            self.update_spec_metrics(
                len(running_batch.reqs), 0, num_accept_tokens=num_generated_tokens
            )
        super().report_decode_stats(can_run_cuda_graph, running_batch, num_generated_tokens)

    def state_pages(self) -> int:
        """State pages that requests hold, by SGLang's accounting; cached pages are free."""
        pool, cache = self.scheduler.req_to_token_pool, self.scheduler.tree_cache
        held = pool.mamba_pool.size - pool.mamba_allocator.available_size()
        if cache.supports_mamba():
            held -= cache.mamba_evictable_size() + cache.mamba_protected_size()
        return held * pool.mamba_pool.num_mamba_layers

    def _log(self) -> None:
        """Log at the interval of SGLang's decode statistics, and only if something was decoded."""
        due = self.forward_ct_decode % self.decode_log_interval == 0
        if self.log_line and due and self.is_stats_logging_rank and (text := self.log_line.text()):
            logger.info(text)


class MetricsPublisher:
    """Copies a board to metrics of prometheus_client."""

    def __init__(self, board: Board, labels: dict[str, Any]) -> None:
        self.board = board
        families = {name: family(metric, labels) for name, metric in board.metrics.items()}
        self.shown: list[float] = []  # the number of each sample, as it was copied last
        self.show: list[Callable[[float, float], None]] = []
        for name, value in board.index:
            metric = board.metrics[name]
            self.shown.append(nan if metric.kind == "gauge" else 0)
            self.show.append(sample(families[name], metric, labels, value))

    def publish(self) -> None:
        """Copy the numbers that changed."""
        for i, before in enumerate(self.shown):
            number = self.board.numbers[i]
            if number != before and not isnan(number):  # NaN: not known yet
                self.show[i](number, before)
                self.shown[i] = number


def family(metric: Metric, labels: dict[str, Any]) -> Any:
    """A metric without samples."""
    # prometheus_client decides by a variable that SGLang sets at start whether to use files.
    from prometheus_client import Counter, Gauge, Histogram

    name = PREFIX + metric.name
    if metric.kind == "histogram":
        return Histogram(name, metric.help, list(labels), buckets=list(map(int, metric.values)))
    names = [*labels, metric.label] if metric.label else list(labels)
    if metric.kind == "counter":
        return Counter(name, metric.help, names)
    return Gauge(name, metric.help, names, multiprocess_mode="mostrecent")


def sample(
    family: Any, metric: Metric, labels: dict[str, Any], value: str
) -> Callable[[float, float], None]:
    """A function that sets a sample's new value, given the old one."""
    if metric.kind == "histogram":
        histogram = family.labels(**labels)

        def observe(number: float, before: float) -> None:
            """`Histogram.observe`, `count` times: calling it for each token would take too long."""
            times = number - before
            histogram._sum.inc(times * int(value))
            histogram._buckets[metric.values.index(value)].inc(times)

        return observe
    labels = labels | {metric.label: value} if metric.label else labels
    if metric.kind == "counter":
        counter = family.labels(**labels)
        return lambda number, before: counter.inc(number - before)
    return lambda number, _: family.labels(**labels).set(number)  # no sample before the first
