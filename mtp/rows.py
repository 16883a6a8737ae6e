"""Rows of the step that has just ended, with the tokens that they add, as the MTP layer reads them.

The layer reads the trunk's hidden state at a position with the token after it, so tokens are
shifted by one. The last one of a row was sampled by the step, or is the next one of its prompt.
"""

from dataclasses import dataclass

import torch

NOTHING = torch.empty(0)


@dataclass(slots=True)
class Tokens:
    """Consecutive committed tokens of one request, as input of the MTP layer.

    Shapes:
        token_ids [n] of positions first+1 to first+n, hidden_states [n, D] of the trunk at
        positions first to first+n-1
    """

    first: int
    token_ids: torch.Tensor
    hidden_states: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """The position after the last token's hidden state."""
        return self.first + len(self)


@dataclass(slots=True, kw_only=True)
class Row:
    """A row of the batch: one request in the step that just ended, and in the draft after it."""

    request: str
    index: int  # in the batch
    tokens: Tokens  # committed by the step
    scheduled: int  # tokens of the step, rejected drafts included
    continues: bool  # it decoded or verified in the step; False: the step read its prompt
    prefilling: bool = False  # more of its prompt follows, so no token was sampled
    draft: int = 0  # tokens to draft now
    fed: Tokens | None = None  # what the MTP layer reads now; None: it skips the layer

    @property
    def drafted(self) -> int:
        """Draft tokens that the step verified."""
        return self.scheduled - 1

    @property
    def accepted(self) -> int:
        """Draft tokens that the step accepted."""
        return len(self.tokens) - 1

    @property
    def caught_up(self) -> int:
        """Tokens of earlier steps that the MTP layer reads now."""
        return min(self.fed.end, self.tokens.first) - self.fed.first if self.fed else 0

    def free_hidden_states(self) -> None:
        """Drop what no later step reads, so that an idle engine does not keep it in memory."""
        for tokens in (self.tokens, self.fed):
            if tokens is not None:
                tokens.hidden_states = NOTHING


@dataclass(slots=True, kw_only=True)
class FinishedStep:
    """A step of T tokens that has just ended; lists have an element for each of its N rows.

    Shapes: token_ids [T], the token after each of the step's; hidden_states [T, D]
    """

    requests: list[str]
    starts: list[int]  # among the tokens
    firsts: list[int]  # position of the first token
    scheduled: list[int]  # tokens, rejected drafts included
    counts: list[int]  # tokens without them
    prefilling: list[bool]  # more of its prompt follows
    continues: list[bool]  # it decoded or verified; else the step read its prompt
    token_ids: torch.Tensor
    hidden_states: torch.Tensor

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def is_plain(self) -> bool:
        """Whether each row decoded one token."""
        return len(self.token_ids) == len(self) and all(self.continues)

    @property
    def verifies(self) -> bool:
        """Whether a row had drafts."""
        return any(n > 1 for n, more in zip(self.scheduled, self.continues, strict=True) if more)

    def row(self, i: int) -> Row:
        """Row i, with its committed tokens."""
        tokens = slice(self.starts[i], self.starts[i] + self.counts[i])
        return Row(
            request=self.requests[i],
            index=i,
            tokens=Tokens(self.firsts[i], self.token_ids[tokens], self.hidden_states[tokens]),
            scheduled=self.scheduled[i],
            continues=self.continues[i],
            prefilling=self.prefilling[i],
        )
