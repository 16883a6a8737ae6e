"""An engine around the loop: requests whose tokens and hidden states are their positions.

It checks what any engine counts on: the MTP layer reads every token of a request once and in order,
a request drafts when the layer has read all of them, and never more than it can use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen3next_plugin.mtp.loop import Loop, usable_drafts
from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.pending import MAX_BYTES, Pending
from qwen3next_plugin.mtp.policy import Policy
from qwen3next_plugin.mtp.rows import FinishedStep, Row

D = 2
BYTES = 8 + 4 * D  # of a pending token
K = 4  # drafts at most

Lengths = Callable[[Sequence[str]], list[int]]


class Script(Policy):
    """Drafts `length` tokens, or what it returns for the requests; writes down what it is given."""

    def __init__(self, length: int | Lengths = 0) -> None:
        self.length = length
        self.asked: list[dict[str, int]] = []  # each time, pending tokens of each request
        self.verified: list[tuple[str, int, int, int]] = []  # request, drafted, accepted, steps
        self.timed: list[tuple[str, int, int, float]] = []  # step or draft, batch, tokens or passes
        self.forgotten: list[str] = []

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        self.asked.append(dict(zip(requests, pending, strict=True)))
        fixed = self.length
        return [fixed] * len(requests) if isinstance(fixed, int) else fixed(requests)

    def observe_verify(self, request: str, drafted: int, accepted: int, steps: int = 1) -> None:
        self.verified.append((request, drafted, accepted, steps))

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self.timed.append(("step", batch, tokens, seconds))

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        self.timed.append(("draft", batch, passes, seconds))

    def forget(self, request: str) -> None:
        self.forgotten.append(request)


class OneRank:
    world_size = 1


@dataclass
class Request:
    """What an engine knows of one."""

    prompt: int
    end: int  # tokens that it may have
    computed: int = 0
    drafts: int = 0  # to verify in the next step
    read: int = 0  # by the MTP layer: where its cache ends
    steps: int = 0  # that decoded


@dataclass
class Engine:
    """Runs steps of requests, by the loop, and keeps what the MTP layer read last in `fed`."""

    policy: Script = field(default_factory=Script)
    max_tokens: int = 100
    step_seconds: float = 0.0
    max_bytes: int = MAX_BYTES
    ranks: Any = field(default_factory=OneRank)
    must_run: bool = False
    after_prompts: bool = False
    requests: dict[str, Request] = field(default_factory=dict)
    fed: dict[str, tuple[int, int]] = field(default_factory=dict)  # first position, tokens

    def __post_init__(self) -> None:
        self.board = Board(K)
        self.loop = Loop(
            observer=Observer(self.policy, self.board),
            ranks=self.ranks,
            max_tokens=self.max_tokens,
            step_seconds=self.step_seconds,
            usable_drafts=lambda request, computed: usable_drafts(
                self.requests[request].end, computed
            ),
            must_run=self.must_run,
            after_prompts=self.after_prompts,
            pending=Pending(self.max_bytes),
        )

    def begin(self, *names: str, prompt: int = 5, end: int = 1000) -> None:
        for name in names:
            self.requests[name] = Request(prompt, end)

    def preempt(self, name: str, cached: int = 0) -> None:
        """Its cache is lost, but for a prefix, and it is read again up to its last token."""
        one = self.requests[name]
        one.prompt, one.computed, one.read, one.drafts = one.computed + 1, cached, cached, 0

    def pending(self, *names: str) -> list[int]:
        return [self.loop.pending.count(name) for name in names]

    def step(
        self,
        decode: Sequence[str] = (),
        *,
        read: Sequence[str] = (),
        chunk: int = 1000,
        accepted: int = 0,
        seconds: float | None = 1.0,
        drafting: float = 0.5,
    ) -> dict[str, int]:
        """A step that decodes requests, or verifies their drafts, and reads prompts of others.

        `chunk`: tokens of each prompt; `accepted`: drafts, where there are so many. Returns what
        each request drafts now.
        """
        rows = [*decode, *read]
        plain = not read and not any(self.requests[name].drafts for name in rows)
        plain = plain and self.loop.continued_by(rows, [self.requests[n].computed for n in rows])
        starts, scheduled, counts, firsts = [], [], [], []
        tokens: list[int] = []
        for name in rows:
            one = self.requests[name]
            starts.append(len(tokens))
            firsts.append(one.computed)
            if one.computed < one.prompt:
                counts.append(min(chunk, one.prompt - one.computed))
                scheduled.append(counts[-1])
            else:
                one.steps += 1
                counts.append(1 + min(accepted, one.drafts))
                scheduled.append(1 + one.drafts)
            tokens += range(one.computed, one.computed + scheduled[-1])
        for name, count in zip(rows, counts, strict=True):
            one = self.requests[name]
            one.computed, one.drafts = one.computed + count, 0
        positions = torch.tensor(tokens)
        hidden_states = positions[:, None].float().expand(-1, D).clone()
        if plain:
            fed = self.loop.plain_step(positions + 1, hidden_states, seconds)
        else:
            step = FinishedStep(
                requests=rows,
                starts=starts,
                firsts=firsts,
                scheduled=scheduled,
                counts=counts,
                prefilling=[self.requests[n].computed < self.requests[n].prompt for n in rows],
                continues=[name in decode for name in rows],
                token_ids=positions + 1,
                hidden_states=hidden_states,
            )
            fed = self.loop.step(step, self.requests.keys(), seconds)
            on = [i for i, more in enumerate(step.prefilling) if not (more or step.is_plain)]
            assert all(  # vLLM finds out from these which rows decode
                self.loop.ends[rows[i]] == self.requests[rows[i]].computed for i in on
            )
        self.fed = {}
        for row in fed:
            self._run(row)
        self.loop.drafted(drafting, drafting)
        return {row.request: row.draft for row in fed if row.draft}

    def _run(self, row: Row) -> None:
        """The MTP layer reads a row's tokens, and drafts."""
        one, tokens = self.requests[row.request], row.fed
        assert tokens is not None
        assert tokens.first == one.read
        positions = list(range(tokens.first, tokens.end))
        assert tokens.token_ids.tolist() == [at + 1 for at in positions]
        assert tokens.hidden_states[:, 0].tolist() == positions
        one.read, one.drafts = tokens.end, row.draft
        self.fed[row.request] = tokens.first, len(tokens)
        if row.draft:
            assert tokens.end == one.computed
            assert one.computed + 1 + row.draft + 1 <= one.end
