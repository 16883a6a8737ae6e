"""Plain steps: consecutive steps without drafts of the same requests, to look at later.

While nothing is drafted, choosing draft lengths and keeping tokens would be most of what MTP costs.
So a drafter only collects such steps, and looks at several at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending, PendingTokens, Row

EVERY = 8  # most steps that are collected


def wait_after(idle: int) -> int:
    """Steps to collect after `idle` steps for which nothing was drafted.

    Few at first: the policy may just try how fast steps are without drafts.
    """
    return max(1, min(EVERY, idle // 4))


@dataclass(slots=True)
class PlainSteps:
    """Steps that the drafter has not looked at yet. In each, each request got one token.

    Shapes: token_ids [N] and hidden_states [N, D] of each step
    """

    requests: list[str]
    firsts: list[int]  # position of each request's first token that was not looked at
    observer: Observer
    pending: Pending
    reported: int = 0  # of these steps, to the observer
    token_ids: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of steps that were timed

    def __len__(self) -> int:
        return len(self.token_ids)

    def continued_by(self, requests: Sequence[str], positions: Sequence[int]) -> bool:
        """Whether a step with one token of each request, at these positions, is the next one."""
        n = len(self)
        return self.requests == requests and [first + n for first in self.firsts] == positions

    def add(
        self, token_ids: torch.Tensor, hidden_states: torch.Tensor, seconds: float | None
    ) -> None:
        """`seconds`: None if the step was not timed."""
        self.token_ids.append(token_ids)
        self.hidden_states.append(hidden_states)
        if seconds is not None:
            self.seconds.append(seconds)

    def look(self, choose: Callable[[list[str], int], list[int]]) -> list[Row]:
        """Learn from the steps and choose lengths; the rows of the last step if it drafts.

        The other steps stay pending for the MTP layer. `choose`: draft length of each request,
        given how many tokens of each will be pending besides those that are.
        """
        self._report()
        lengths = choose(self.requests, len(self) - 1)
        rows = self._take_last() if any(lengths) else []
        for row, length in zip(rows, lengths, strict=bool(rows)):
            row.draft = length
        self.keep()
        if rows:
            self.firsts = [first + 1 for first in self.firsts]
        return rows

    def keep(self) -> None:
        """Keep the steps for the MTP layer without choosing lengths, and go on behind them."""
        if n := len(self):
            self._report()
            self.observer.observe_skipped(n * len(self.requests))
            self.pending.put_steps(self.requests, self.firsts, self.token_ids, self.hidden_states)
            self.firsts = [first + n for first in self.firsts]
            self.token_ids.clear()
            self.hidden_states.clear()
        self.reported = 0

    def _report(self) -> None:
        if new := len(self) - self.reported:
            self.observer.observe_plain(self.requests, new, self.seconds)
            self.seconds.clear()
            self.reported = len(self)

    def _take_last(self) -> list[Row]:
        """Remove the last step; its rows."""
        token_ids, hidden_states = self.token_ids.pop(), self.hidden_states.pop()
        self.reported -= 1
        parts = zip(self.requests, self.firsts, strict=True)
        return [
            Row(
                request=request,
                index=i,
                tokens=PendingTokens(
                    first + len(self), token_ids[i : i + 1], hidden_states[i : i + 1]
                ),
                scheduled=1,
                continues=True,
            )
            for i, (request, first) in enumerate(parts)
        ]
