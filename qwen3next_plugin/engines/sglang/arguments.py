"""Flags: what is filled in, and what is refused before a process starts."""

import logging
from collections.abc import Callable
from typing import Any

from qwen3next_plugin.config import check_num_speculative_tokens

logger = logging.getLogger("sglang.qwen3next_plugin")


def complete_drafts(host: Callable[..., None], server_args: Any) -> None:
    """Around `_handle_eagle_family`: a chain of as many drafts as there are steps.

    Qwen's own command names the steps only; SGLang 0.5.23 then compares a missing topk with 1 and
    dies. Can go when it fills in the rest itself.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    given = resolving_view(server_args)
    steps, topk = given.speculative_num_steps, given.speculative_eagle_topk
    missing: dict[str, int] = {}
    if steps is not None:
        check_num_speculative_tokens(steps)
        if topk is None:
            missing["speculative_eagle_topk"] = topk = 1
        if given.speculative_num_draft_tokens is None:
            missing["speculative_num_draft_tokens"] = steps * topk + 1
    if missing:
        declare_resolution(server_args, "qwen3next_plugin", **missing)
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in missing.items())
        logger.info("qwen3next_plugin: %s, as %d steps ask for", " ".join(flags), steps)
    host(server_args)
