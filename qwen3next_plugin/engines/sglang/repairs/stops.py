"""Stop strings under drafts: an answer ends at the token at which it ends without them."""

from collections import deque
from collections.abc import Callable
from typing import Any


def stop_at_first(host: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """Wrap `Req.update_finish_state`: look at the tokens of a verification one by one.

    SGLang looks at all of them for the first string of its list, and then for stop tokens.
    """
    params = req.sampling_params
    several = new_accepted_len > 1 and (params.stop_strs or params.stop_regex_strs)
    if not several or req.finished() or req.to_finish:
        return host(req, new_accepted_len)
    behind = deque(req.output_ids[-new_accepted_len:])
    del req.output_ids[-new_accepted_len:]
    grammar, req.grammar = req.grammar, None  # it has read all of them
    while behind and not req.finished():
        req.output_ids.append(behind.popleft())
        if not behind:
            req.grammar = grammar
        host(req, 1)
    req.grammar = grammar
    if req.finished() and req.finished_len is None:
        req.finished_len = len(req.output_ids)
    req.output_ids.extend(behind)
    return None
