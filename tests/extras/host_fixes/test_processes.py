"""Texts in processes of their own: what a matcher asks them, and how one ends."""

import json
import mmap
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engines.clients import eventually
from qwen3next_plugin.extras.host_fixes import matchers, processes


class Counter:
    """Takes all tokens, of which one computes or sleeps for so long; ends with token 0."""

    def __init__(
        self, state: dict[str, Any], dear: int = -1, cpu: float = 0, sleep: float = 0, room: int = 0
    ) -> None:
        self.tokens: list[int] = []
        self.dear, self.cpu, self.sleep = dear, cpu, sleep
        try:
            self.held = mmap.mmap(-1, room or 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # untouched
        except OSError:
            raise MemoryError from None

    def accept(self, token: int) -> bool:
        if token == self.dear:
            end = time.process_time() + self.cpu
            while time.process_time() < end:
                pass
            time.sleep(self.sleep)
        self.tokens.append(token)
        return True

    def roll_back(self, count: int) -> None:
        del self.tokens[-count:]

    def mask(self) -> bytes:
        """The tokens 0 to 7, and 8 + the number of those that it has."""
        if self.tokens[-1:] == [0]:
            return b""
        return ((1 << 8 + len(self.tokens)) | 0xFF).to_bytes(200, "little")


class Dear(Counter):
    """Computes for so long when it is made."""

    def __init__(self, state: dict[str, Any], cpu: float) -> None:
        super().__init__(state, 5, cpu)
        self.accept(5)
        self.dear = -1


def tokens_there(state: dict[str, Any], name: int) -> list[int]:
    return state["matchers"][name].tokens


@pytest.fixture(autouse=True)
def started(monkeypatch) -> None:
    monkeypatch.setattr(processes, "_shared", processes.Shared())
    processes.start()


def test_drafts_that_are_taken_back_leave_nothing():
    matcher = matchers.Matcher("drafts", Counter)
    for step in range(100):
        assert matcher.accept([1, 2, 3]) == 3
        matcher.roll_back(3)
        assert matcher.accept([8 + 3 * step, 1, 7]) == 3
        assert matchers.allows(matcher.mask, 8 + 3 * step + 3)
        assert matcher.accept([9000]) == matcher.accept([-1]) == 0
    _, there = matcher.process.call(1, tokens_there, matcher.name)
    assert there == [token for step in range(100) for token in (8 + 3 * step, 1, 7)]
    assert matcher.accept([5, 0, 4]) == 2
    assert matcher.terminated
    matcher.roll_back(2)
    assert not matcher.terminated


def test_what_an_earlier_draft_told_is_not_asked_again():
    matcher = matchers.Matcher("asked", Counter)
    assert matcher.accept([1, 2, 3]) == 3
    matcher.roll_back(3)
    matcher.process.end()
    assert matcher.accept([1, 2]) == 2
    with pytest.raises(processes.OverBudgetError):
        matcher.accept([4])


def test_what_is_asked_ahead_is_known_later():
    """Of several texts, and of several requests of one."""
    three = [matchers.Matcher(text, Counter) for text in ("a", "a", "b")]
    matchers.ask_ahead([(each, [1, 2, 9000, 4]) for each in three])
    for each in three:
        each.process.end()
        assert each.accept([1, 2, 9000]) == 2
        with pytest.raises(processes.OverBudgetError):
            each.accept([3])


def test_one_that_takes_for_ever_ends_with_all_of_its_text():
    dear, same, other = (matchers.Matcher(text, Counter, 5, 1e9) for text in ("a", "a", "b"))
    assert (dear.accept([4]), same.accept([4]), other.accept([4])) == (1, 1, 1)
    with pytest.raises(processes.OverBudgetError):
        dear.accept([4, 5])
    with pytest.raises(processes.OverBudgetError):
        same.accept([6])
    assert other.accept([6]) == 1
    assert matchers.Matcher("a", Counter).accept([5]) == 1


def test_one_that_waits_for_ever_ends(monkeypatch):
    monkeypatch.setattr(processes, "WAIT_SECONDS", 0.5)
    waiting = matchers.Matcher("waits", Counter, 5, 0, 600)
    with pytest.raises(processes.OverBudgetError):
        waiting.accept([5])


def test_many_dear_texts_together_take_no_more_than_one(monkeypatch):
    """Nor do honest ones end then."""
    monkeypatch.setattr(processes, "SHARE", 0)
    honest = matchers.Matcher("honest", Counter)
    dear = [matchers.Matcher(number, Counter, 5, 0.3 * processes.SECONDS) for number in range(12)]
    went_on = 0
    for each in dear:
        try:
            went_on += each.accept([5])
        except processes.OverBudgetError:
            assert honest.accept([4]) == 1
    assert 1 <= went_on <= 3
    assert processes._shared.left >= -len(dear) * 2 * processes.CALL_SECONDS


@pytest.mark.parametrize("tokens", [1, 4, 32])
@pytest.mark.parametrize("texts", [8, processes.MOST])
def test_a_step_takes_little_whatever_it_asks(monkeypatch, texts, tokens):
    """All texts at once take all that they may; step after step, until only cheap ones go on."""
    monkeypatch.setattr(processes, "SHARE", 0)
    budgets = [processes.Budget() for _ in range(texts)]
    honest = processes.HONEST_SECONDS * tokens
    for step in range(1000):
        taken = [each.take(tokens) for each in budgets]
        most = (0 if step else processes.SECONDS) + texts * (processes.CALL_SECONDS + honest)
        assert sum(taken) <= most
        for each, seconds in zip(budgets, taken, strict=True):
            each.settle(seconds, seconds, tokens)
    assert max(taken) <= honest + processes.CALL_SECONDS / 10


def test_what_a_timer_would_not_limit_is_nothing():
    budget = processes.Budget()
    budget.settle(0, processes.SECONDS - 1e-7, 0)
    assert budget.take(4) == 0


def test_one_that_is_dear_to_make_again_ends(monkeypatch):
    """Steps of those that it has wait meanwhile."""
    first = matchers.Matcher("again", Dear, 2 * processes.AGAIN_SECONDS)
    assert first.accept([5]) == 1
    with pytest.raises(processes.OverBudgetError):
        matchers.Matcher("again", Dear, 1e9)
    with pytest.raises(processes.OverBudgetError):
        first.accept([6])


def test_one_that_takes_too_much_memory_is_refused():
    with pytest.raises(processes.OverBudgetError):
        matchers.Matcher("memory", Counter, -1, 0, 0, 2 << 30)


def test_texts_together_take_no_more_memory_than_they_may():
    """The largest ends."""
    most = processes.GIB_TOGETHER + 1
    large = [matchers.Matcher(f"{i}", Counter, -1, 0, 0, 9 * 2**30 // 10) for i in range(most - 1)]
    with pytest.raises(processes.OverBudgetError):
        matchers.Matcher("the largest", Counter, -1, 0, 0, 95 * 2**30 // 100)
    small = matchers.Matcher("small", Counter, -1, 0, 0, 2**29)
    assert small.accept([5]) == 1
    assert sum(each.process.ended for each in large) == 1
    large.clear()
    assert matchers.Matcher("again", Counter, -1, 0, 0, 9 * 2**30 // 10).accept([5]) == 1


def test_texts_wait_for_a_process(monkeypatch):
    monkeypatch.setattr(processes, "MOST", 2)
    two = [matchers.Matcher(f"place {i}", Counter) for i in range(2)]
    with ThreadPoolExecutor() as pool:
        third = pool.submit(matchers.Matcher, "place 3", Counter)
        same = pool.submit(matchers.Matcher, "place 1", Counter)
        assert same.result(60).accept([5]) == 1
        time.sleep(0.2)
        assert not third.done()
        two.pop(0)
        assert third.result(60).accept([5]) == 1


def test_processes_without_requests_end_some_time():
    for number in range(2 * processes.KEPT):
        matchers.Matcher(f"idle {number}", Counter)
    idle = [each for each in processes._TEXTS.values() if not each.users]
    assert len(idle) <= processes.KEPT + 1  # the last was in use when the others were counted


def pid_there(state: dict[str, Any]) -> int:
    return os.getpid()


def test_a_server_that_is_killed_leaves_no_process():
    """Nor one that computes."""
    ours, theirs = os.pipe()
    if (server := os.fork()) == 0:
        try:
            processes.start()
            matcher = matchers.Matcher("left", Counter, 5, 1e9)
            both = (processes.first(), matcher.process)
            pids = [each.call(1, pid_there)[1] for each in both]
            os.write(theirs, json.dumps(pids).encode())
            matcher.process.send(1, matchers.follow, [(matcher.name, 0, [], [5])])
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(theirs)
    pids = json.loads(os.read(ours, 100))
    os.close(ours)
    assert len(pids) == len([pid for pid in pids if os.path.exists(f"/proc/{pid}")]) == 2
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_a_process_that_ends_leaves_nothing_open():
    dear = matchers.Matcher("open", Counter, 5, 1e9)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(processes.OverBudgetError):
        dear.accept([5])
    assert len(os.listdir("/proc/self/fd")) == before - 1
