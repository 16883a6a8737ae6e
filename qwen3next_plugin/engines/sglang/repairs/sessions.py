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


def continue_in_session(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Begin the next turn behind the answer that the client has, then as `replace_in_session`.

    A verification may have accepted drafts behind the token that ended it.
    """
    asked = req.session_params
    before = None if session.streaming else session.req_nodes.get(asked.rid)
    if before is not None and before.req.finished():
        before.req.output_ids = before.req.output_ids_through_stop
    return replace_in_session(host, session, req, *args, **more)


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
