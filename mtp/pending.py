"""What the MTP layer has yet to see: committed tokens of requests that skipped its pass."""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Rows:
    """Consecutive committed tokens of one request, as the MTP layer takes them.

    Shapes:
        token_ids [n] of positions first+1 to first+n, hidden_states [n, D] of the trunk at
        positions first to first+n-1
    """

    first: int
    token_ids: torch.Tensor
    hidden_states: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


class Lag:
    """Rows by request. A request that drafts nothing skips the MTP layer and catches up later.

    The layer's KV of the skipped positions is written in one pass when the request drafts again,
    so skipping costs next to nothing and loses no acceptance.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Rows]] = {}
        self._pending: dict[str, int] = {}  # tokens of each, asked in every step

    def pending(self, request: str) -> int:
        """Number of tokens that the request is behind."""
        return self._pending.get(request, 0)

    def put(self, request: str, rows: Rows) -> None:
        """Keep rows for later; a copy, since engines reuse what they came in."""
        kept = Rows(rows.first, rows.token_ids.clone(), rows.hidden_states.clone())
        self._rows[request] = [*self._continued(request, rows.first), kept]
        self._pending[request] = kept.first + len(kept) - self._rows[request][0].first

    def take(self, request: str, rows: Rows) -> Rows:
        """All that the request is behind, up to and with `rows`; nothing is pending then."""
        parts = [*self._continued(request, rows.first), rows]
        self._rows.pop(request, None)
        self._pending.pop(request, None)
        if len(parts) == 1:
            return rows
        return Rows(
            parts[0].first,
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.hidden_states for part in parts]),
        )

    def keep_only(self, requests: set[str]) -> None:
        """Drop every request that is not among these."""
        for request in self._rows.keys() - requests:
            del self._rows[request], self._pending[request]

    def _continued(self, request: str, first: int) -> list[Rows]:
        """What is pending, if it ends right before `first`: a resumed request starts afresh."""
        parts = self._rows.get(request, [])
        return parts if parts and parts[-1].first + len(parts[-1]) == first else []
