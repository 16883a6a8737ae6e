"""Sessions under drafts: if a turn ends in a verification, the next begins at its answer's end."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.ON_CPU,
    "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req",
    reason="with drafts SGLang continues a session after a token that was never computed",
    remove_when="a session's slot keeps no more than kv_committed_len",
)
def keep_computed(host: Callable[..., bool], sessions: Any, req: Any) -> bool:
    """Begin the next turn of a streaming session where the state ends.

    SGLang also counts the last token of a verification, which no step has read yet.
    """
    record, computed = req.kv, req.kv.kv_committed_len
    kept = host(sessions, req)
    if kept:
        record.kv_committed_len = min(record.kv_committed_len, computed)
    return kept


@patch(
    When.WITH_OURS,
    "sglang.srt.session.session_controller.Session.create_req",
    reason="drafts that were accepted behind a stop token are part of the next turn",
    remove_when="NEXTN changes no turn of a session",
)
def continue_behind_answer(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Wrap `Session.create_req`: begin the next turn after the answer that the client has.

    A verification may have accepted drafts after the token that ended it.
    """
    before = session.req_nodes.get(req.session_params.rid)
    if not session.streaming and before is not None and before.req.finished():
        before.req.output_ids = before.req.output_ids_through_stop
    return host(session, req, *args, **more)
