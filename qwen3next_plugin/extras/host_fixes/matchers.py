"""Matchers of grammars in separate processes, with a cache of their answers.

A round trip takes 0.16 ms or more, so only unknown states are asked for, once for all tokens of a
draft, and from all processes of a step at once.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol
from weakref import finalize

from qwen3next_plugin.extras.host_fixes.processes import (
    AGAIN_SECONDS,
    COMPILE_SECONDS,
    LimitedProcess,
    OverBudgetError,
    aside,
    data_bytes,
    hold,
    process_of,
)

_NAMES = count()  # of matchers, in their processes
KNOWN = (
    64  # masks that both sides know by number: one has 19 KB, and most states of a text share it
)


class Grammar(Protocol):
    """An engine's matcher, in a text's process."""

    def accept(self, token: int) -> bool:
        """Advance by a token, if it may follow."""

    def roll_back(self, count: int) -> None:
        """Take back so many tokens."""

    def mask(self) -> bytes:
        """The bits of the tokens that may follow; nothing after the end."""


@dataclass(eq=False, slots=True)
class Node:
    """A state of a matcher: `mask` has the tokens that may follow; empty: the grammar has ended."""

    mask: bytes
    token: int = -1
    depth: int = 0
    before: "Node | None" = None
    after: "dict[int, Node]" = field(default_factory=dict)


def allows(mask: bytes, token: int) -> bool:
    """Whether a token is in the mask."""
    byte, bit = divmod(token, 8)
    return 0 <= byte < len(mask) and bool(mask[byte] >> bit & 1)


class Matcher:
    """A matcher in its text's process, made by `make(state, *args)`; asks only what is not cached.

    Raises:
        OverBudgetError: in each call that asks.
    """

    ROLL_BACK = 64  # tokens that may be taken back, at least

    def __init__(self, text: Hashable, make: Callable[..., Grammar], *args: Any) -> None:
        self.name = next(_NAMES)
        self.process = process = process_of(text, self)
        finalize(self, process.gone.append, self.name).atexit = False
        with process.making:
            gone = process.gone[:]
            asked = (new_matcher, self.name, gone, make, *args)
            if process.made:
                _, (mask, nbytes) = process.call(AGAIN_SECONDS, *asked)
            else:
                _, (mask, nbytes) = process.call(COMPILE_SECONDS, aside, *asked)
            del process.gone[: len(gone)]
            process.made = True
        hold(process, nbytes)
        self._at = self._there = Node(mask)  # state here; state in the process

    @property
    def mask(self) -> bytes:
        """The bits of the tokens that may follow; nothing after the grammar's end."""
        return self._at.mask

    @property
    def terminated(self) -> bool:
        """Whether the grammar has ended."""
        return not self._at.mask

    def accept(self, tokens: Sequence[int]) -> int:
        """Advance until a token may not follow or the grammar ends; returns how many were taken."""
        ask_ahead([(self, tokens)])
        count = self._known(tokens)
        if self.process.ended and count < len(tokens) and allows(self.mask, tokens[count]):
            raise OverBudgetError
        return count

    def roll_back(self, count: int) -> None:
        """Take back so many tokens."""
        for _ in range(count):
            assert self._at.before is not None
            self._at = self._at.before

    def _known(self, tokens: Sequence[int]) -> int:
        """Advance by the tokens whose states are cached; returns their number."""
        for place, token in enumerate(tokens):
            if token not in self._at.after:
                return place
            self._at = self._at.after[token]
        return len(tokens)

    def question(self, tokens: Sequence[int]) -> "Question | None":
        """The question to the process about states after these tokens; None: nothing to ask."""
        start = self._at
        known = self._known(tokens)
        node, (back, path), self._at = self._at, self._way(), start
        unknown = list(tokens[known:])
        if not unknown or not allows(node.mask, unknown[0]):
            return None
        return Question(self, node, back, path, unknown)

    def learn(self, node: Node, tokens: Sequence[int], masks: Sequence[bytes | int]) -> None:
        """Store the masks after each of these tokens, which follow `node`."""
        for token, said in zip(tokens, masks, strict=False):
            mask = said if isinstance(said, bytes) else self.process.masks[said]
            if mask is said:
                _keep(self.process.masks, mask)
            node.after[token] = node = Node(mask, token, node.depth + 1, node)
        self._there = node
        if node.depth % self.ROLL_BACK < len(masks):
            self._forget()

    def _way(self) -> tuple[int, list[int]]:
        """How many tokens the process must take back, and which to accept, to reach our state."""
        back, path, node, there = 0, [], self._at, self._there
        while node is not there:
            if node.depth > there.depth:
                path.append(node.token)
                assert node.before is not None
                node = node.before
            else:
                assert there.before is not None
                back, there = back + 1, there.before
        return back, path[::-1]

    def _forget(self) -> None:
        """Drop states that are too old to roll back to, and drafts that were not taken."""
        node = self._at
        for _ in range(self.ROLL_BACK):
            if node.before is None:
                return
            node.before.after = {node.token: node}
            node = node.before
        node.before = None


@dataclass(frozen=True, slots=True)
class Question:
    """What a matcher asks its process."""

    matcher: Matcher
    node: Node
    back: int
    path: list[int]
    tokens: list[int]


def ask_ahead(asked: Iterable[tuple[Matcher, Sequence[int]]]) -> None:
    """Learn the states after each matcher's tokens: one call per process, all in parallel."""
    calls: dict[LimitedProcess, list[Question]] = {}
    for matcher, tokens in asked:
        if (question := matcher.question(tokens)) is not None:
            calls.setdefault(matcher.process, []).append(question)
    for process, taken in [(process, _send(process, calls[process])) for process in calls]:
        _receive(process, taken, calls[process])


def _send(process: LimitedProcess, questions: Sequence[Question]) -> float:
    taken = process.budget.take(sum(len(each.tokens) for each in questions))
    if not taken:
        process.end()
    said = [(each.matcher.name, each.back, each.path, each.tokens) for each in questions]
    process.send(taken, follow, said)
    return taken


def _receive(process: LimitedProcess, taken: float, questions: Sequence[Question]) -> None:
    spent, answers = taken, list[list[bytes | int]]()
    try:
        spent, answers = process.receive()
    except Exception:  # `accept` raises OverBudgetError
        process.end()
    process.budget.settle(taken, spent, sum(len(each.tokens) for each in questions))
    for each, masks in zip(questions, answers, strict=False):
        each.matcher.learn(each.node, each.tokens, masks)


def new_matcher(
    state: dict[str, Any], name: int, gone: list[int], make: Callable[..., Grammar], *args: Any
) -> tuple[bytes, int]:
    """In the process: a new matcher's first mask, and the memory that the text takes."""
    matchers = state.setdefault("matchers", {})
    for each in gone:
        matchers.pop(each, None)
    matchers[name] = make(state, *args)
    return matchers[name].mask(), data_bytes() - state["data"]


def follow(
    state: dict[str, Any], questions: Sequence[tuple[int, int, Sequence[int], Sequence[int]]]
) -> list[list[bytes | int]]:
    """In the process: the masks after each token, to the end or to one that may not follow.

    A mask that both sides know is given by its number.
    """
    known = state.setdefault("masks", [])
    said: list[list[bytes | int]] = []
    for name, back, path, tokens in questions:
        said.append([])
        for mask in _follow(state["matchers"][name], back, path, tokens):
            if mask in known:
                said[-1].append(known.index(mask))
            else:
                said[-1].append(mask)
                _keep(known, mask)
    return said


def _keep(known: list[bytes], mask: bytes) -> None:
    """Remember a mask; both sides clear their lists at the same one."""
    if len(known) == KNOWN:
        known.clear()
    known.append(mask)


def _follow(matcher: Grammar, back: int, path: Sequence[int], tokens: Sequence[int]) -> list[bytes]:
    if back:
        matcher.roll_back(back)
    for token in path:
        matcher.accept(token)
    masks: list[bytes] = []
    for token in tokens:  # the first of them may follow
        if (masks and not allows(masks[-1], token)) or not matcher.accept(token):
            break
        masks.append(matcher.mask())
    return masks
