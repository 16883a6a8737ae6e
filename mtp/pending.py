"""Pending tokens: committed tokens that the MTP layer has not seen yet.

A request that drafts nothing skips the MTP layer, and so does every prompt. Their tokens are kept
here, and the MTP layer reads them when the request drafts. Skipping therefore costs almost nothing
and loses no acceptance.
"""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

import torch

from qwen3next_plugin.mtp.rows import Row, Tokens

MAX_BYTES = 256 * 2**20  # of all pending tokens together: 65,000 tokens of Qwen3-Next


@dataclass(slots=True)
class _Kept:
    """The pending tokens of one request."""

    end: int = 0  # the position after the last one
    places: list[int] = field(default_factory=list)  # in the store, of consecutive positions
    lost: bool = False


class Pending:
    """The pending tokens of each request, in one store of a fixed size.

    A request whose tokens do not fit is lost: its tokens are dropped, and it cannot draft until it
    is read again from another position, for example after a preemption. `lose` marks a request as
    lost whose KV of the MTP layer is gone.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: dict[str, _Kept] = {}
        self._size, self._used = 0, 0  # places of the store; how many were ever used
        self._free: list[int] = []  # places that were used and are free again
        self._token_ids = self._hidden_states = torch.empty(0)  # the store

    def count(self, request: str) -> int:
        """Number of tokens that are pending."""
        kept = self._kept.get(request)
        return len(kept.places) if kept else 0

    def lost(self, request: str) -> bool:
        """Whether tokens of the request are missing, so that it cannot draft."""
        kept = self._kept.get(request)
        return kept is not None and kept.lost

    def feed(self, rows: Sequence[Row], limit: int, *, every: bool = False) -> list[Row]:
        """Set what the MTP layer reads now, pending tokens first; returns the rows it reads.

        Reads the rows that draft (all rows with `every`), at most `limit` tokens, and first the
        rows with the fewest pending tokens. A request drafts once it has caught up.
        """
        skipping = []
        for row in sorted(rows, key=lambda row: self.count(row.request)):
            if limit and (row.draft or every):
                row.fed = self.take(row, limit)
                limit -= len(row.fed) if row.fed else 0
            else:
                skipping.append(row)
            if row.fed is None or row.fed.end < row.tokens.end:
                row.draft = 0
        self.put(skipping)
        return [row for row in rows if row.fed is not None]

    def put(self, rows: Sequence[Row]) -> None:
        """Keep the tokens of rows that skip the MTP layer."""
        places: list[int] = []
        kept: list[Tokens] = []
        for row in rows:
            self._make_store(row.tokens.token_ids, row.tokens.hidden_states)
            if found := self._reserve(row.request, row.tokens.first, len(row.tokens)):
                places += found
                kept.append(row.tokens)
        if kept:
            token_ids = torch.cat([part.token_ids for part in kept])
            self._write(places, token_ids, torch.cat([part.hidden_states for part in kept]))

    def put_steps(
        self,
        requests: Iterable[str],
        firsts: Iterable[int],
        token_ids: Sequence[torch.Tensor],
        hidden_states: Sequence[torch.Tensor],
    ) -> None:
        """Keep the tokens of n steps that had one token of each request.

        Shapes: requests, firsts [N] of the first step; token_ids n × [N], hidden_states n × [N, D]
        """
        n, places, kept = len(token_ids), [], []
        self._make_store(token_ids[0], hidden_states[0])
        for i, (request, first) in enumerate(zip(requests, firsts, strict=True)):
            if found := self._reserve(request, first, n):
                places.append(found)
                kept.append(i)
        if len(kept) < len(token_ids[0]):
            token_ids, hidden_states = ([t[kept] for t in x] for x in (token_ids, hidden_states))
        if kept:
            in_order = [place for step in zip(*places, strict=True) for place in step]
            self._write(in_order, torch.cat(list(token_ids)), torch.cat(list(hidden_states)))

    def take(self, row: Row, limit: int) -> Tokens | None:
        """What the MTP layer reads now, for a row that drafts; None if its request is lost.

        Takes the oldest `limit` of its pending tokens and the row's. The rest stays pending; the
        request can draft once nothing is pending.
        """
        self._resume(row.request, row.tokens.first)
        if not (self.count(row.request) or self.lost(row.request)) and len(row.tokens) <= limit:
            self._kept.pop(row.request, None)
            return row.tokens
        self.put([row])
        kept = self._kept[row.request]
        if kept.lost:
            return None
        first, places = kept.end - len(kept.places), kept.places[:limit]
        del kept.places[:limit]
        self._free += places
        if not kept.places:
            del self._kept[row.request]
        index = torch.tensor(places)
        return Tokens(first, self._token_ids[index], self._hidden_states[index])

    def keep_only(self, requests: Set[str]) -> None:
        """Drop all other requests."""
        for request in self._kept.keys() - requests:
            self._free += self._kept.pop(request).places

    def lose(self, request: str, end: int) -> None:
        """Mark a request as lost; its next token is at position `end`."""
        if kept := self._kept.get(request):
            self._free += kept.places
        self._kept[request] = _Kept(end=end, lost=True)

    def _resume(self, request: str, first: int) -> None:
        """Drop the pending tokens unless the request continues where they end."""
        kept = self._kept.get(request)
        if kept is not None and kept.end != first:
            self._free += self._kept.pop(request).places

    def _reserve(self, request: str, first: int, count: int) -> list[int]:
        """Reserve places from position `first` on; if too few are left, the request is lost."""
        self._resume(request, first)
        kept = self._kept.get(request)
        if kept is None:
            kept = self._kept[request] = _Kept()
        kept.end = first + count
        if kept.lost:
            return []
        if count > len(self._free):
            self._grow(count - len(self._free))
        if count > len(self._free):
            self._free += kept.places
            kept.places, kept.lost = [], True
            return []
        places = self._free[-count:]
        del self._free[-count:]
        kept.places += places
        return places

    def _write(self, places: list[int], token_ids: torch.Tensor, states: torch.Tensor) -> None:
        """Copy tokens into the store: engines reuse the tensors."""
        index = torch.tensor(places)
        # index_copy_ and not [index] = …, which starts all threads for a few rows.
        self._token_ids.index_copy_(0, index, token_ids)
        self._hidden_states.index_copy_(0, index, states)

    def _make_store(self, token_ids: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Make the store for tokens like these. The system provides memory as it is touched."""
        if not self._size:
            self._size = self.max_bytes // (token_ids[:1].nbytes + hidden_states[:1].nbytes)
            self._token_ids = token_ids.new_empty(self._size)
            self._hidden_states = hidden_states.new_empty(self._size, hidden_states.shape[1])

    def _grow(self, places: int) -> None:
        """Free `places` unused places, or all that are left."""
        used = min(self._size, self._used + places)
        self._free += range(self._used, used)
        self._used = used
