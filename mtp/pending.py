"""Pending tokens: committed tokens that the MTP layer has not seen yet.

A request that drafts nothing skips the MTP layer. Its tokens are kept here, and one pass writes
the layer's KV for all of them when the request drafts again. Skipping therefore costs almost
nothing and loses no acceptance.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch

MAX_PENDING = 256  # tokens of one request that an engine lets wait


@dataclass(slots=True)
class PendingTokens:
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
    tokens: PendingTokens  # committed by the step
    scheduled: int  # tokens of the step, rejected drafts included
    continues: bool  # it decoded or verified in the step; False: the step read its prompt
    prefilling: bool = False  # more of its prompt follows, so no token was sampled
    draft: int = 0  # tokens to draft now
    fed: PendingTokens | None = None  # what the MTP layer reads now; None: it skips the layer

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
        return len(self.fed) - len(self.tokens) if self.fed else 0

    def free_hidden_states(self) -> None:
        """Drop what no later step reads, so that an idle engine does not keep it in memory."""
        for tokens in (self.tokens, self.fed):
            if tokens is not None:
                tokens.hidden_states = tokens.hidden_states.new_empty(0)


class Pending:
    """The pending tokens of each request."""

    def __init__(self) -> None:
        self._parts: dict[str, list[PendingTokens]] = {}  # one for each step that was skipped
        self._counts: dict[str, int] = {}  # tokens of each request, read in every step

    def count(self, request: str) -> int:
        """Number of tokens that are pending."""
        return self._counts.get(request, 0)

    def put(self, request: str, tokens: PendingTokens) -> None:
        """Keep a copy for later: engines reuse the tensors."""
        kept = PendingTokens(tokens.first, tokens.token_ids.clone(), tokens.hidden_states.clone())
        self._parts[request] = [*self._before(request, tokens.first), kept]
        self._counts[request] = kept.end - self._parts[request][0].first

    def take(self, request: str, tokens: PendingTokens) -> PendingTokens:
        """Remove and return everything that is pending, followed by `tokens`."""
        parts = [*self._before(request, tokens.first), tokens]
        self._parts.pop(request, None)
        self._counts.pop(request, None)
        if len(parts) == 1:
            return tokens
        return PendingTokens(
            parts[0].first,
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.hidden_states for part in parts]),
        )

    def keep_only(self, requests: Set[str]) -> None:
        """Drop all other requests."""
        for request in self._parts.keys() - requests:
            del self._parts[request], self._counts[request]

    def _before(self, request: str, first: int) -> list[PendingTokens]:
        """What ends right before `first`; nothing where the request resumed elsewhere."""
        parts = self._parts.get(request, [])
        return parts if parts and parts[-1].end == first else []
