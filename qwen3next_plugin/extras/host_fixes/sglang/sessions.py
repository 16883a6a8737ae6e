"""Sessions: refuses turns that end SGLang's scheduler, and frees memory of idle sessions."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.WITH_OURS,
    "sglang.srt.session.session_controller.Session.create_req",
    reason="a request that replaces a session's earlier ones, a streaming turn without a token "
    "to read, or one beside a refused one ends SGLang's scheduler",
    remove_when="SGLang serves the sessions of test_hostile.py",
    upstream="https://github.com/sgl-project/sglang/issues/36475",
)
def continue_in_session(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Wrap `Session.create_req`: refuse a turn that cannot be read."""
    if session.streaming:
        return _continue_streaming(host, session, req, *args, **more)
    added = len(req.input_ids)
    made = replace_in_session(host, session, req, *args, **more)
    if made.to_finish is None and _cuts_an_image(made, len(made.origin_input_ids) - added):
        made.set_finish_with_abort(
            "session_params.offset: it cuts an image off the session; begin a new one"
        )
    return made


def _cuts_an_image(made: Any, kept: int) -> bool:
    """Whether an image that a turn inherits extends beyond the tokens that it keeps.

    SGLang would embed the whole image anyway.
    """
    inherited = made.multimodal_inputs.mm_items if made.multimodal_inputs is not None else ()
    return any(end >= kept for item in inherited for _, end in item.offsets or ())


def _continue_streaming(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Refuse a turn without a token to read, and keep a refused turn from ending another one.

    A state of all tokens has no logits. After refusing a turn, SGLang considers the session's
    running turn ended, and lets a third one write to the same state.
    """
    last = [node.req for node in session.req_nodes.values()]  # of the previous turn, if any
    made = host(session, req, *args, **more)
    if made.to_finish is None and not req.input_ids and last and not last[0].output_ids:
        session.abort_req()
        made.set_finish_with_abort(
            "input_ids: the session's last turn has no answer to continue; send at least one token"
        )
    if made.to_finish is not None:
        req.mm_inputs = made.session = None
    return made


def replace_in_session(
    host: Callable[..., Any], session: Any, req: Any, *args: Any, **more: Any
) -> Any:
    """Drop a session's requests that a request replaces, before SGLang does.

    SGLang changes a dict while iterating over it, and looks up a shared name twice.
    """
    asked, nodes = req.session_params, session.req_nodes
    if asked.replace:
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


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
    reason="with --disable-radix-cache, a streaming turn with ignore_eos that is cut into "
    "chunks ends SGLang's scheduler",
    remove_when="add_one_req_ignore_eos takes a request with a prefix",
)
def add_turn(host: Callable[..., Any], adder: Any, req: Any, *args: Any, **more: Any) -> Any:
    """Wrap `PrefillAdder.add_one_req`: schedule a turn as if it did not ignore the end token.

    Without a radix cache SGLang assumes that a request that ignores it has no prefix.
    """
    params = req.sampling_params
    if not (params.ignore_eos and req.prefix_len):
        return host(adder, req, *args, **more)
    params.ignore_eos = False
    try:
        return host(adder, req, *args, **more)
    finally:
        params.ignore_eos = True


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
    reason="idle streaming sessions keep rows, state pages and tokens, in the end all of them",
    remove_when="SGLang evicts idle sessions as it evicts cached prefixes",
    upstream="https://github.com/sgl-project/sglang/issues/27024",
)
def make_room(host: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Wrap `get_new_batch_prefill`: take memory from streaming sessions while others lack it.

    Between its turns a session keeps a row, a state page and its tokens. Without them its next turn
    reads the whole text again, as it does after a turn that was aborted.
    """
    plan = host(scheduler, running_batch)
    while plan.batch_to_run is None and _lacks_room(scheduler, plan.running_batch):
        if not _forget_one(scheduler, plan.running_batch):
            break
        plan.running_batch.batch_is_full = False
        plan = host(scheduler, plan.running_batch)
    return plan


def _lacks_room(scheduler: Any, running: Any) -> bool:
    """Whether a request waits for memory, or running ones lack it for their next tokens."""
    if not scheduler.tree_cache.session_records():
        return False
    if running.is_empty():
        return bool(scheduler.waiting_queue) and scheduler.chunked_req is None
    if not running.check_decode_mem():
        return True
    full = running.batch_is_full and len(running.reqs) < scheduler.max_running_requests
    return full and bool(scheduler.waiting_queue)


def _forget_one(scheduler: Any, running: Any) -> bool:
    """Take the memory of the idle session whose last turn is the longest ago.

    If none is idle and nothing runs, turns wait for each other: take the last waiting one's.
    """
    held = scheduler.tree_cache.session_records()
    waiting = {req.session.session_id: req for req in scheduler.waiting_queue if req.session}
    idle = [
        session
        for name, session in scheduler.session_controller.sessions.items()
        if name in held and name not in waiting and not session._inflight
    ]
    if idle:
        name = min(idle, key=lambda session: session.last_active_time).session_id
    else:
        late = [] if not running.is_empty() else [name for name in waiting if name in held]
        if not late:
            return False
        name = late[-1]
        if waiting[name].kv is held[name]:
            waiting[name].detach_kv()
    scheduler.tree_cache.release_session(name)
    return True
