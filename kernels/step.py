"""Step: what one engine step tells the ops on state pages; and its rows, checked.

An engine's step builder makes it (engines/*/state/steps.py), and every linear layer reads the same.
"""

from dataclasses import dataclass

from torch import Tensor

GRID = 8  # S is folded at positions that are multiples of it; kGrid of native/step.h
NULL_SLOT = -1  # slot of a padding row: it has no page, and its output is zero


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step, built once and shared by all linear layers.

    A row is one sequence. Whether it prefills, decodes or verifies a draft, and how many drafts of
    the step before were accepted, follows from its context length and its page.

    Shapes:
        query_start_loc [N+1] int32   row i owns tokens query_start_loc[i] to [i+1]
        slot            [N]   int32   the page of each row, or NULL_SLOT
        context_len     [N]   int32   tokens of the sequence committed before this step; 0: fresh

    max_query_len is an upper bound on a row's tokens, known on the host: a launch need not wait for
    the device.
    """

    query_start_loc: Tensor
    slot: Tensor
    context_len: Tensor
    num_tokens: int
    max_query_len: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the step that has a page: its tokens, and where the page can continue."""

    slot: int
    begin: int
    end: int
    context: int  # tokens before this step's
    p0: int  # the position of the page's S
    long: bool  # more tokens than a roll-back can undo: all are final

    @property
    def span(self) -> tuple[int, int]:
        """The page's (start, end) after the step."""
        end = self.context + self.end - self.begin
        return (end if self.long else self.context), end


def checked_rows(step: Step, span: Tensor, T: int, num_drafts: int) -> list[Row]:
    """The rows that have a page. Up to num_drafts + 1 tokens a row can be rolled back.

    Raises: RuntimeError naming the row if an index is out of range, or if its page cannot continue
        at its context length.
    """
    starts = step.query_start_loc.tolist()
    slots, contexts = step.slot.tolist(), step.context_len.tolist()
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
        n = end - begin
        continues = 0 <= first <= c <= last <= first + num_drafts + 1 and c + n < 2**31
        if c != 0 and not continues:
            raise RuntimeError(
                f"row {i}: slot {page} holds start={first} end={last}"
                f" and cannot continue at context length c={c}"
            )
        p0 = first // GRID * GRID if c else 0
        rows.append(Row(page, begin, end, c, p0, long=n > num_drafts + 1))
    return rows
