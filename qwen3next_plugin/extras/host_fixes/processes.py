"""Runs work on a client's text in a separate process, which the kernel ends if it takes too long.

One call of a grammar's matcher may take minutes, such as the mask after one token of
`(((a{1,100}){1,100}){1,100}){1,100}` if the vocabulary has a token of many letters a. Only the end
of its process stops a native call. So each text has a process, forked from one that was forked
before the weights were loaded, and a timer of CPU time in the kernel. All requests with that text
share the process and its budget; other requests are not affected when it ends.
"""

import gc
import os
import pickle
import resource
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn
from weakref import WeakSet

# CPU time of all requests of a text: an initial budget, and more for each token. All texts together
# have the same initial budget, and then a share of the elapsed time.
SECONDS, TOKEN_SECONDS, SHARE = 0.2, 0.002, 0.25
# After that, a call still gets CALL_SECONDS, and HONEST_SECONDS per token. Honest calls take less,
# 0.02 to 0.2 ms (measured: schemas of tools, 150,000 tokens in the vocabulary), so they never end.
# The kernel counts ticks of 4 ms or more: with less time an honest call might end early.
CALL_SECONDS, HONEST_SECONDS = 0.01, 0.0003
# Checking and compiling a text takes milliseconds for schemas of real tools. No step waits for it,
# unless another request has the same text. An enum of 4,000 strings takes longer.
COMPILE_SECONDS, AGAIN_SECONDS, GIB, GIB_TOGETHER = 2, 0.05, 1, 4
# Most processes: of texts that no request has now, but may have again, and of texts in use. Further
# texts wait: at worst a step takes SECONDS, and CALL_SECONDS for each process, on all cores.
KEPT, MOST = 16, 16 * len(os.sched_getaffinity(0))
NICE = 10  # a ninth of the priority of what serves
WAIT_SECONDS = 60  # wall time: limit of a call, and of waiting for one of MOST processes
EXCEEDED = (
    f"takes over {COMPILE_SECONDS} s of CPU time or {GIB} GiB of memory, or all together "
    f"{GIB_TOGETHER} GiB"
)
TOO_DEAR = (
    f"takes over {SECONDS} s of CPU time beyond {TOKEN_SECONDS * 1e3:.0f} ms for each token, or, "
    f"with all such texts, over {SHARE:.0%} of the time"
)


class OverBudgetError(Exception):
    """A process was ended because it exceeded its time or memory."""


class Shared:
    """CPU time that all texts together may still take; a share of the time is added."""

    def __init__(self) -> None:
        self._left, self._at = SECONDS, time.monotonic()

    @property
    def left(self) -> float:
        """What is left, at most SECONDS; negative if overdrawn."""
        now = time.monotonic()
        self._left = min(SECONDS, self._left + SHARE * (now - self._at))
        self._at = now
        return self._left

    def take(self, seconds: float) -> None:
        """Take seconds, or give back if negative."""
        self._left = self.left - seconds


_shared = Shared()


class Budget:
    """CPU time that a text's requests together may still take while steps wait."""

    def __init__(self) -> None:
        self._left = SECONDS

    def take(self, tokens: int) -> float:
        """Take the time allowed to the next call, of so many tokens; 0: none is left."""
        # At most half of the shared rest: other calls may begin before this one is over.
        most = max(CALL_SECONDS, HONEST_SECONDS * tokens, _shared.left / 2)
        taken = min(self._left, most)
        if taken < CALL_SECONDS / 10:  # a timer of 0 would be off
            return 0.0
        _shared.take(taken)
        return taken

    def settle(self, taken: float, spent: float, tokens: int) -> None:
        """Give back what a call of so many tokens has not spent."""
        _shared.take(spent - taken)
        more = TOKEN_SECONDS if _shared.left > 0 else HONEST_SECONDS
        self._left = min(SECONDS, self._left + more * tokens) - spent


class LimitedProcess:
    """A process that calls functions with its state, one after another."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock, self.ended = connection, threading.Lock(), False
        self.budget, self.nbytes = Budget(), 0
        self.users: WeakSet[Any] = WeakSet()
        self.making, self.made = threading.Lock(), False  # of matchers; whether one was made
        self.gone: list[int] = []  # matchers no longer in use
        self.masks: list[bytes] = []  # that the process has, too

    def call(self, seconds: float, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        """The CPU time that `function(state, *args)` took there, and what it returned.

        Raises:
            OverBudgetError: it took over `seconds`, or more memory than is allowed.
            Exception: what the function raised.
        """
        self.send(seconds, function, *args)
        return self.receive()

    def send(self, seconds: float, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call, which `receive` ends."""
        self._lock.acquire()
        if self.ended:
            self._connection.close()
        with suppress(OSError):  # `receive` raises
            self._connection.send((seconds, WAIT_SECONDS, function, args))

    def receive(self) -> tuple[float, Any]:
        """What `call` returns."""
        try:
            spent, error, answer = self._connection.recv()
        except (EOFError, OSError):
            self.ended = True
            raise OverBudgetError from None
        finally:
            if self.ended:
                self._connection.close()
            self._lock.release()
        if error is not None:
            raise error
        return spent, answer

    def fork(self) -> "LimitedProcess":
        """Another process with the state of this one."""
        ours, theirs = Pipe()
        with theirs, self._lock:
            self._connection.send(None)
            send_handle(self._connection, theirs.fileno(), 0)
        return LimitedProcess(ours)

    def end(self) -> None:
        """End it, now or when its call is over; wait for neither."""
        self.ended = True
        if self._lock.acquire(blocking=False):
            self._connection.close()
            self._lock.release()


_FIRST: dict[int, LimitedProcess] = {}  # by the process that forked it
_TEXTS: OrderedDict[Hashable, LimitedProcess] = OrderedDict()
_LOCK = threading.Lock()


def start(**state: Any) -> None:
    """Fork the first process, with `state`; all further ones are forked from it."""
    if started():
        return
    ours, theirs = Pipe()
    if os.fork() == 0:
        _begin(theirs, state)
    theirs.close()
    _FIRST[os.getpid()] = LimitedProcess(ours)


def started() -> bool:
    """Whether this process has called `start`."""
    return os.getpid() in _FIRST


def first() -> LimitedProcess:
    """The process that `start` forked."""
    return _FIRST[os.getpid()]


def process_of(text: Hashable, user: object) -> LimitedProcess:
    """The process of a text; ends the least recently used processes without users.

    Raises:
        TimeoutError: the maximum number of processes is in use.
    """
    end = time.monotonic() + WAIT_SECONDS
    while (found := _process_of(text, user)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{MOST} others are in use: try again later")
        time.sleep(0.02)
    return found


def _process_of(text: Hashable, user: object) -> LimitedProcess | None:
    with _LOCK:
        found = _TEXTS.pop(text, None)
        idle = [key for key, each in _TEXTS.items() if not each.users]
        if (found is None or found.ended) and len(_TEXTS) - len(idle) >= MOST:
            return None
        for key in idle[: max(0, len(idle) - KEPT)]:
            _TEXTS.pop(key).end()
        if found is None or found.ended:
            found = first().fork()
        _TEXTS[text] = found
        found.users.add(user)
        return found


def hold(process: LimitedProcess, nbytes: int) -> None:
    """Record a process's memory; if the total is too large, end idle ones, then the largest.

    Raises:
        OverBudgetError: it is the largest.
    """
    with _LOCK:
        process.nbytes = nbytes
        for key in [key for key, each in _TEXTS.items() if each.ended]:
            del _TEXTS[key]
        for key in [key for key, each in _TEXTS.items() if not each.users]:
            if _held() > GIB << 30:
                _TEXTS.pop(key).end()
        if _held() > GIB_TOGETHER << 30:
            largest = max(_TEXTS.values(), key=lambda each: each.nbytes)
            largest.end()
            if largest is process:
                raise OverBudgetError


def _held() -> int:
    return sum(each.nbytes for each in _TEXTS.values())


def _begin(connection: Connection, state: dict[str, Any]) -> NoReturn:
    """Serve as the first process: close the parent's files, and ignore its signals."""
    try:
        import torch

        torch.set_num_threads(1)
        gc.disable()  # it would write to, and so copy, all memory that forks share
        gc.freeze()
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number != connection.fileno():
                try:
                    os.close(number)
                except OSError:  # the folder's own
                    continue
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # it ends with its connection
        for each in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: forks are not waited for
        _serve(connection, state)
    finally:
        os._exit(1)


def _serve(connection: Connection, state: dict[str, Any]) -> None:
    while True:
        try:
            asked = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        if asked is not None:
            connection.send(_answer(state, *asked))
            continue
        handle = recv_handle(connection)
        if os.fork():
            os.close(handle)
        else:
            connection.close()
            connection = Connection(handle)
            state["data"] = data_bytes()
            most = state["data"] + (GIB << 30)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def aside(state: dict[str, Any], function: Callable[..., Any], *args: Any) -> Any:
    """In a process: call a function that no step waits for, at lower priority.

    Uses a new thread: a thread cannot raise its priority again, and steps wait for later calls.
    """

    def be_nice() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

    with ThreadPoolExecutor(1, initializer=be_nice) as thread:
        return thread.submit(function, state, *args).result()


def data_bytes() -> int:
    """Bytes of this process's private data (VmData)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


def _answer(
    state: dict[str, Any],
    seconds: float,
    wait_seconds: float,
    function: Callable[..., Any],
    args: Sequence[Any],
) -> tuple[float, Exception | None, Any]:
    clocks = time.process_time, time.thread_time  # the first lags by a tick under a timer
    began = [clock() for clock in clocks]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wait_seconds if seconds else 0)
    error, answer = None, None
    try:
        answer = function(state, *args)
    except MemoryError:
        os._exit(1)
    except Exception as raised:
        try:
            pickle.loads(pickle.dumps(raised))
            error = raised
        except Exception:  # it cannot be sent, whatever the reason
            error = RuntimeError(f"{type(raised).__name__}: {raised}")
    for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(timer, 0)
    spent = max(clock() - then for clock, then in zip(clocks, began, strict=True))
    return spent, error, answer
