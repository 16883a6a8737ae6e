"""A client that leaves ends its own request, and no other."""

from collections.abc import Callable
from typing import Any

OTHER = "\0"  # no name of a request begins so


def abort_one(host: Callable[..., None], scheduler: Any, asked: Any) -> None:
    """Abort the request of this name; SGLang aborts all whose names begin with it.

    Names are random, or given by clients: `a` would be the beginning of one in sixteen.
    """
    if asked.abort_all:
        return host(scheduler, asked)
    others = [req for req in _requests(scheduler) if req.rid != asked.rid]
    for req in others:
        req.rid = OTHER + req.rid
    try:
        host(scheduler, asked)
    finally:
        for req in others:
            req.rid = req.rid.removeprefix(OTHER)


def _requests(scheduler: Any) -> list[Any]:
    """All that wait or run, each once."""
    chunked = [] if scheduler.chunked_req is None else [scheduler.chunked_req]
    waiting = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    running = scheduler.collect_inflight_reqs()
    return [*{id(req): req for req in (*chunked, *waiting, *running)}.values()]
