"""What one engine step asks of each state page, checked before anything is written."""

from dataclasses import dataclass

from torch import Tensor

GRID = 8  # L: S is folded where a position is a multiple of it; kGrid of native/step.h


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part of the step: its page, its tokens, and where the page stands."""

    slot: int
    begin: int
    end: int
    context: int  # tokens before this step's
    p0: int  # the grid point at which the page's S stands
    long: bool  # more tokens than can be rolled back: all of them are certain

    @property
    def span(self) -> tuple[int, int]:
        """What the page says after the step: before `start` all is certain, at `end` it ends."""
        end = self.context + self.end - self.begin
        return (end if self.long else self.context), end


def checked_rows(
    query_start_loc: Tensor, slot: Tensor, context_len: Tensor, span: Tensor, T: int, k: int
) -> list[Row]:
    """The rows that have a page; k is the longest draft, so that k + 1 tokens are a short row.

    Raises: RuntimeError naming the row where an index is out of range, or where the context
    length is not one the page can continue at.
    """
    starts, slots, contexts = query_start_loc.tolist(), slot.tolist(), context_len.tolist()
    rows: list[Row] = []
    taken: set[int] = set()
    for i, (page, c) in enumerate(zip(slots, contexts, strict=True)):
        begin, end = starts[i : i + 2]
        if not 0 <= begin <= end <= T:
            raise RuntimeError(
                f"row {i}: query_start_loc {begin} to {end} is not a range of {T} tokens"
            )
        if page == -1:
            continue
        if not 0 <= page < len(span):
            raise RuntimeError(f"row {i}: slot {page} is not one of {len(span)} slots")
        if page in taken:
            raise RuntimeError(f"row {i}: slot {page} is used by an earlier row")
        taken.add(page)
        first, last = span[page].tolist()
        stands = 0 <= first <= c <= last <= first + k + 1 and c + end - begin < 2**31
        if c != 0 and not stands:
            raise RuntimeError(
                f"row {i}: slot {page} holds start={first} end={last}"
                f" and cannot continue at context length c={c}"
            )
        p0 = first // GRID * GRID if c else 0
        rows.append(Row(page, begin, end, c, p0, long=end - begin > k + 1))
    return rows
