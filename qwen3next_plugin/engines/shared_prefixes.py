"""Where prompts are likely to part, so that a state page there serves those that follow."""

from collections.abc import Collection, Sequence
from contextlib import suppress

LEAST = 64  # tokens: a shorter prefix is not worth a page


def first_message(tokens: Sequence[int], ends: Collection[int]) -> int:
    """Length of a prompt's first message if another one follows, else 0.

    `ends` are the tokens that end a message.
    """
    end = _find(tokens, ends, 0)
    return 0 if end is None or _find(tokens, ends, end + 1) is None else end + 1


def _find(tokens: Sequence[int], wanted: Collection[int], start: int) -> int | None:
    """Index of the first of the wanted tokens from `start` on."""
    found = []
    for token in wanted:
        with suppress(ValueError):
            found.append(tokens.index(token, start))
    return min(found, default=None)
