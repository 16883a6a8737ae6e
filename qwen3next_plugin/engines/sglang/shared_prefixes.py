"""Where SGLang's radix tree gets a state page, so that other prompts can continue from there.

The tree has the KV of every token of a prompt, but a state page only where a chunk ended. So chunks
end where prompts are likely to part: at a junction (the tree has this prompt's KV up to there, but
no page), and behind the first message, often a system prompt that many requests share.
"""

from typing import Any

from qwen3next_plugin.engines.shared_prefixes import LEAST, first_message


def next_place(req: Any, context: int) -> int | None:
    """The next position at which to keep a page of a prompt, of which `context` tokens are read."""
    if req.skip_radix_cache_insert or req.return_hidden_states is True:
        return None  # SGLang returns hidden states of a prompt's last chunk only
    tokens, first = req.origin_input_ids, max(context + 1, LEAST)
    places = (req.mamba_branching_seqlen or 0, _first_message(req))
    return min((at for at in places if first <= at < len(tokens)), default=None)


def _first_message(req: Any) -> int:
    """`first_message` of a request, looked for once."""
    if not hasattr(req, "qwen3next_first_message"):
        ends = req.eos_token_ids or ()
        req.qwen3next_first_message = first_message(req.origin_input_ids, ends)
    return req.qwen3next_first_message
