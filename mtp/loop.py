"""The loop of drafting: what an engine does after each step, apart from running the MTP layer.

While nothing is drafted, most of MTP's cost would be choosing lengths and keeping tokens. So plain
steps, in which each request gets one token, are only collected, and processed several at a time.
Prompts, and steps for which nothing is drafted, are kept for the MTP layer (pending.py). policy.py
chooses the lengths; an engine's drafter calls this loop and runs the MTP layer.
"""

import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch

from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.ranks import Ranks
from qwen3next_plugin.mtp.rows import FinishedStep, Row, Tokens

CATCH_UP = 1024  # most tokens that the MTP layer reads in a step, per second of the step's budget
ATTENTION = 4096  # context length at which its attention takes as long as all else
LEAST = 16  # minimum tokens read per drafting request: its step's and some pending ones
EVERY = 8  # most steps without drafts between two choices of lengths


def wait_after(idle: int) -> int:
    """Steps until lengths are chosen again, after `idle` steps for which nothing was drafted.

    Few at first, because the policy may only be trying steps without drafts.
    """
    return max(1, min(EVERY, idle // 4))


def usable_drafts(end: int, computed: int) -> int:
    """Drafts that a request can use, given its final length and its number of computed tokens.

    The next token is sampled already, and a step yields one token more than it has drafts.
    """
    return max(0, end - computed - 2)


@dataclass(slots=True)
class PlainSteps:
    """Unprocessed steps of the same requests, with one token per request and step.

    Shapes: token_ids [N] and hidden_states [N, D] of each step
    """

    requests: list[str]
    firsts: list[int]  # position of each request's first unprocessed token
    token_ids: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of steps that were timed

    def __len__(self) -> int:
        return len(self.token_ids)

    def take_last(self) -> list[Row]:
        """Remove the last step and return its rows."""
        token_ids, hidden_states = self.token_ids.pop(), self.hidden_states.pop()
        return [
            Row(
                request=request,
                index=i,
                tokens=Tokens(first + len(self), token_ids[i : i + 1], hidden_states[i : i + 1]),
                scheduled=1,
                continues=True,
            )
            for i, (request, first) in enumerate(zip(self.requests, self.firsts, strict=True))
        ]


@dataclass(kw_only=True)
class Loop:
    """The state machine of drafting; one per worker.

    After each step an engine calls `step`, or `plain_step` if `continued_by`. Both return the rows
    that the MTP layer reads now (`Row.fed`), each with the number of tokens to draft (`Row.draft`).
    The engine runs the passes, and reports their time with `drafted`.
    """

    observer: Observer
    usable_drafts: Callable[[str, int], int]  # (request, computed tokens) → drafts
    max_tokens: int = sys.maxsize  # of one pass of the MTP layer
    step_seconds: float = 0.0  # a step's budget; 0: no limit
    ranks: Ranks | None = None  # all use the first one's lengths
    must_run: bool = False  # the MTP layer reads every token in its own step
    after_prompts: bool = False  # requests also draft right after their prompt
    pending: Pending = field(default_factory=Pending)
    ends: dict[str, int] = field(default_factory=dict, init=False)  # of requests that may go on
    plain: PlainSteps | None = field(default=None, init=False)  # the next step may be one of them
    rows: list[Row] = field(default_factory=list, init=False)  # processed, until `drafted`
    idle: int = field(default=0, init=False)  # steps in a row for which nothing was drafted
    wait: int = field(default=0, init=False)  # such steps until lengths are chosen

    def step(self, step: FinishedStep, known: Set[str], seconds: float | None) -> list[Row]:
        """Process a step. Requests not in `known` have ended; seconds: None if not timed.

        Lengths are chosen after a verification, and every few steps if nothing is drafted. A
        request does not draft right after its prompt, so that its first token is not delayed.
        """
        self.keep_plain()
        self.plain = None
        self._forget_others(known)
        if step.is_plain and not self.must_run:
            self.plain = PlainSteps(step.requests, step.firsts)
            return self.plain_step(step.token_ids, step.hidden_states, seconds)
        if self.must_run or step.verifies or (any(step.continues) and self._is_time()):
            return self._choose_after(step, seconds)
        self._keep_unread(step)
        return []

    def continued_by(self, requests: Sequence[str], positions: Sequence[int]) -> bool:
        """Whether `plain_step` is enough for one token of each request, at these positions."""
        plain = self.plain
        if plain is None or plain.requests != requests:
            return False
        n = len(plain)
        return [first + n for first in plain.firsts] == positions

    def plain_step(
        self, token_ids: torch.Tensor, hidden_states: torch.Tensor, seconds: float | None
    ) -> list[Row]:
        """Add one more token of each request of the last plain step. Shapes: [N], [N, D]."""
        plain = self.plain
        assert plain is not None
        plain.token_ids.append(token_ids)
        plain.hidden_states.append(hidden_states)
        if seconds is not None:
            plain.seconds.append(seconds)
        return self._choose_after_plain(plain) if self._is_time() else []

    def drafted(self, seconds: float, passes_seconds: float | None) -> None:
        """Report that drafting ended; passes_seconds: of the passes alone, None if unknown."""
        if self.rows:
            self.observer.observe_draft(self.rows, passes_seconds=passes_seconds, seconds=seconds)
            self.rows = []

    def keep_plain(self) -> None:
        """Keep the plain steps so far for the MTP layer, without choosing lengths."""
        if self.plain is not None and len(self.plain):
            self._report(self.plain)
            self._make_pending(self.plain)

    def _is_time(self) -> bool:
        """Count a step without drafts; return whether to choose lengths after it."""
        self.idle, self.wait = self.idle + 1, self.wait - 1
        return self.wait <= 0

    def _choose_after(self, step: FinishedStep, seconds: float | None) -> list[Row]:
        """Learn from a step and choose lengths."""
        rows = [step.row(i) for i in range(len(step))]
        self.observer.observe_step(rows, seconds)
        first = self.after_prompts
        drafting = [row for row in rows if row.continues or (first and not row.prefilling)]
        lengths = self._lengths([row.request for row in drafting], more=0)
        for row, length in zip(drafting, lengths, strict=True):
            row.draft = length
        return self._feed(rows)

    def _choose_after_plain(self, plain: PlainSteps) -> list[Row]:
        """Learn from plain steps and choose lengths. If any is not 0, draft after the last step."""
        self._report(plain)
        lengths = self._lengths(plain.requests, more=len(plain) - 1)
        if not any(lengths):
            self._make_pending(plain)
            self.wait = wait_after(self.idle)
            return []
        rows = plain.take_last()
        for row, length in zip(rows, lengths, strict=True):
            row.draft = length
        self._make_pending(plain)
        self.plain = None
        return self._feed(rows)

    def _lengths(self, requests: Sequence[str], more: int) -> list[int]:
        """How many tokens each request drafts, by the first rank's policy.

        `more`: tokens per request that become pending, besides those that already are.
        """
        if not requests:
            return []
        pending = self.pending
        waiting = [pending.count(request) + more for request in requests]
        lengths = self.observer.policy.lengths(requests, waiting)
        if self.ranks is not None and self.ranks.world_size > 1:
            lengths = self.ranks.broadcast(torch.tensor(lengths), src=0).tolist()
        return [0 if pending.lost(one) else n for one, n in zip(requests, lengths, strict=True)]

    def _feed(self, rows: list[Row]) -> list[Row]:
        """Note where requests continue and when to choose again; return the rows to read now."""
        drafting = [row for row in rows if row.draft]
        if drafting:
            self.idle = 0
        for row in drafting:
            row.draft = min(row.draft, self.usable_drafts(row.request, row.tokens.end))
        self._note_ends(rows)
        self.wait, self.rows = wait_after(self.idle), rows
        fed = self.pending.feed(rows, self._limit(drafting), every=self.must_run)
        for row in rows:
            if row.fed is None:  # its tokens are pending
                row.free_hidden_states()
        return fed

    def _limit(self, drafting: Sequence[Row]) -> int:
        """Most tokens that the MTP layer reads now; other requests wait meanwhile."""
        if self.must_run or not self.step_seconds:
            return self.max_tokens
        context = max((row.tokens.end for row in drafting), default=0)
        most = int(CATCH_UP * self.step_seconds * ATTENTION / (ATTENTION + context))
        return min(self.max_tokens, max(LEAST * len(drafting), most))

    def _keep_unread(self, step: FinishedStep) -> None:
        """Keep a step that reads prompts for the MTP layer."""
        reading = [step.row(i) for i, continues in enumerate(step.continues) if not continues]
        self.pending.put(reading)
        self._note_ends(reading)
        if decoding := [i for i, continues in enumerate(step.continues) if continues]:
            at = torch.tensor([step.starts[i] for i in decoding])
            self.plain = PlainSteps(
                [step.requests[i] for i in decoding],
                [step.firsts[i] for i in decoding],
                [step.token_ids[at]],
                [step.hidden_states[at]],
            )
            self.keep_plain()

    def _report(self, plain: PlainSteps) -> None:
        self.observer.observe_plain(plain.requests, len(plain), plain.seconds)
        plain.seconds.clear()

    def _make_pending(self, plain: PlainSteps) -> None:
        """Move the tokens of reported plain steps to the pending ones."""
        if n := len(plain):
            requests = plain.requests
            self.observer.observe_skipped(n * len(requests))
            self.pending.put_steps(requests, plain.firsts, plain.token_ids, plain.hidden_states)
            plain.firsts = [first + n for first in plain.firsts]
            self.ends.update(zip(requests, plain.firsts, strict=True))
            plain.token_ids.clear()
            plain.hidden_states.clear()

    def _note_ends(self, rows: Sequence[Row]) -> None:
        self.ends.update({row.request: row.tokens.end for row in rows if not row.prefilling})

    def _forget_others(self, known: Set[str]) -> None:
        self.observer.keep_only(known)
        self.pending.keep_only(known)
        for request in self.ends.keys() - known:
            del self.ends[request]
