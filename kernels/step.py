"""What one engine step asks of each state page, checked before anything is written."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part of the step: its page, its tokens, and where the page stands."""

    slot: int
    begin: int
    end: int
    context: int  # tokens before this step's
    committed: int  # how many of those are in the window

    @property
    def fresh(self) -> bool:
        """Whether the sequence begins here, whatever the page holds."""
        return self.context == 0


def checked_rows(
    query_start_loc: Tensor, slot: Tensor, context_len: Tensor, span: Tensor, T: int, W: int
) -> list[Row]:
    """The rows that have a page.

    Raises: RuntimeError naming the row where an index is out of range, or where the context
    length is not one the page can stand at.
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
        p0, w = span[page].tolist()
        if c != 0 and not (c > 0 and 0 <= w <= W and p0 <= c <= p0 + w):
            raise RuntimeError(
                f"row {i}: slot {page} holds p0={p0} w={w}"
                f" and cannot continue at context length c={c}"
            )
        rows.append(Row(page, begin, end, c, c - p0 if c else 0))
    return rows
