"""Sessions: what SGLang's scheduler does not survive of them."""

from collections.abc import Callable
from typing import Any


def keep_computed(host: Callable[..., bool], sessions: Any, req: Any) -> bool:
    """Begin the next turn of a streaming session where the state ends.

    SGLang counts the last token of a verification too, which no step has read yet.
    """
    record, computed = req.kv, req.kv.kv_committed_len
    kept = host(sessions, req)
    if kept:
        record.kv_committed_len = min(record.kv_committed_len, computed)
    return kept


def replace_in_session(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Drop a session's requests that a request replaces, before SGLang does.

    SGLang changes a dict while iterating over it, and looks up a shared name twice.
    """
    asked, nodes = req.session_params, session.req_nodes
    if asked.replace and not session.streaming:
        if asked.rid is None:
            dropped = list(nodes.values())
        elif kept := nodes.get(asked.rid):
            dropped, kept.children = kept.children, []
        else:
            dropped = []
        while dropped:
            node = dropped.pop()
            node.abort()
            dropped += node.children
            if nodes.get(node.req.rid) is node:
                del nodes[node.req.rid]
    return host(session, req, *args, **more)
