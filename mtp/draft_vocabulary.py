"""Which tokens a drafter may draft: all, or the first of the vocabulary and its end.

The trunk verifies with the whole head, so a token that is left out costs acceptance, never the
output. Ids of a byte-pair encoding are in the order of their merges, roughly that of frequency;
added tokens (ends of turns, tool calls, thinking) and padding come last.
"""

import torch

TAIL = 512  # Qwen's added tokens and padding are the last 293 of 151,936


def draft_vocabulary(vocab_size: int, limit: int | None = None) -> torch.Tensor:
    """Token ids that are drafted, ascending [R] int64: `limit` of them, or all.

    Raises: ValueError where the limit leaves nothing but the end of the vocabulary.
    """
    if limit is None or limit >= vocab_size:
        return torch.arange(vocab_size)
    if limit <= TAIL:
        raise ValueError(
            f"a draft vocabulary of {limit} tokens is too small: {TAIL} of them are the end of the"
            " vocabulary, where its added tokens are"
        )
    return torch.cat([torch.arange(limit - TAIL), torch.arange(vocab_size - TAIL, vocab_size)])


def rows_of_shard(ids: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """The ids that a rank holds, of those that are drafted: [R'] of begin ≤ id < end."""
    return ids[(ids >= begin) & (ids < end)]
