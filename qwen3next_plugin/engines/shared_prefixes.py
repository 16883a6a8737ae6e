"""Where a prompt's state page is worth keeping: at places from which other prompts may go on.

Attention's cache has every token of a prompt, but a state page is kept only where a chunk ends. So
chunks end where prompts part: at a junction, to which cached tokens are known but no page is, and
behind the first message, which many prompts share if it is a system prompt.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress

LEAST = 64  # tokens: a shorter prefix is not worth a page


def next_place(
    tokens: Sequence[int], context: int, *, junction: int = 0, ends: Collection[int] = ()
) -> int | None:
    """The next position at which to keep the page of a prompt of which `context` tokens are read.

    `ends` are the tokens that end a message, `junction` is 0 if there is none.
    """
    places = (junction, first_message(tokens, ends))
    first = max(context + 1, LEAST)
    return min((at for at in places if first <= at < len(tokens)), default=None)


def first_message(tokens: Sequence[int], ends: Collection[int]) -> int:
    """Length of a prompt's first message if another one follows, else 0."""
    first = _next(tokens, ends, 0)
    return 0 if first is None or _next(tokens, ends, first + 1) is None else first + 1


def _next(tokens: Sequence[int], wanted: Collection[int], start: int) -> int | None:
    """Index of the first of the wanted tokens from `start` on."""
    found = []
    for token in wanted:
        with suppress(ValueError):
            found.append(tokens.index(token, start))
    return min(found, default=None)
