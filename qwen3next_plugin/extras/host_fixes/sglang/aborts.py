"""A leaving client ends only its own request."""

from collections.abc import Callable, Iterator
from typing import Any

from qwen3next_plugin.engines.sglang.pacing import turns
from qwen3next_plugin.engines.sglang.patches import When, patch

OTHER = "\0"  # no name of a request begins so


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.Scheduler.abort_request",
    reason="a client that names its request `a` and leaves would abort others' requests",
    remove_when="SGLang compares whole names",
    upstream="https://github.com/sgl-project/sglang/issues/24845",
)
def abort_one(host: Callable[..., None], scheduler: Any, asked: Any) -> None:
    """Abort the request of this name; SGLang aborts all whose names begin with it.

    Names are random or chosen by clients: a request named `a` would match one in sixteen others.
    """
    if asked.abort_all:
        return host(scheduler, asked)
    alike = (req for req in _requests(scheduler) if req.rid.startswith(asked.rid))
    others = {id(req): req for req in alike if req.rid != asked.rid}.values()  # each once
    for req in others:
        req.rid = OTHER + req.rid
    try:
        host(scheduler, asked)
    finally:
        for req in others:
            req.rid = req.rid.removeprefix(OTHER)


def _requests(scheduler: Any) -> Iterator[Any]:
    """All waiting or running requests, some more than once."""
    if scheduler.chunked_req is not None:
        yield scheduler.chunked_req
    yield from turns(scheduler).aside
    yield from scheduler.waiting_queue
    yield from scheduler.grammar_manager.grammar_queue
    yield from scheduler.collect_inflight_reqs()
    yield from _handed_over(scheduler)


def _handed_over(scheduler: Any) -> list[Any]:
    """Requests that are shared with another server."""
    from sglang.srt.disaggregation.utils import DisaggregationMode

    if scheduler.disaggregation_mode == DisaggregationMode.PREFILL:
        queue = scheduler.disagg_prefill_bootstrap_queue.queue
        return [*queue, *scheduler.disagg_prefill_inflight_queue]
    if scheduler.disaggregation_mode == DisaggregationMode.DECODE:
        before = scheduler.disagg_decode_prealloc_queue
        entries = [*before.queue, *scheduler.disagg_decode_transfer_queue.queue]
        return [*(entry.req for entry in entries), *before.retracted_queue]
    return []
