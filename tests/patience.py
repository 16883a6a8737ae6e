"""Waiting for what must happen, on a machine that may stand still for minutes or be shared."""

import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

SECONDS = 300  # after which something hangs
STALL = 2.0  # seconds between two looks that count at most
STILL = 0.2  # beyond which a thread that sleeps for 0.01 s shows that the machine stood still


def ticks(seconds: float = SECONDS, every: float = 0.05) -> Iterator[None]:
    """Again and again for so long, without the time in which the machine stood still."""
    spent, last = 0.0, time.monotonic()
    while spent < seconds:
        yield
        time.sleep(every)
        now = time.monotonic()
        spent, last = spent + min(now - last, STALL), now


@contextmanager
def looking() -> Iterator[list[float]]:
    """The times at which a thread that only sleeps has run, for `waited`."""
    looks, done = [time.monotonic()], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            looks.append(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        done.set()
        thread.join()


def waited(since: float, until: float, looks: Sequence[float]) -> float:
    """The time between, without that in which the machine stood still."""
    still = ((a, b) for a, b in pairwise(looks) if b - a > STILL)
    return until - since - sum(max(0.0, min(b, until) - max(a, since)) for a, b in still)


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """What a command prints until it ends; fails if it hangs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    said = options.pop("input", None)
    pipes |= {} if said is None else {"stdin": subprocess.PIPE}
    with subprocess.Popen(command, **pipes | options) as child:
        for _ in ticks(2 * SECONDS, every=0.0):
            try:
                out, err = child.communicate(said, timeout=0.5)
            except subprocess.TimeoutExpired:
                said = None  # it has been sent, or will be
                continue
            return subprocess.CompletedProcess(command, child.returncode, out, err)
        child.kill()
        raise AssertionError(f"{command} does not end: {child.communicate()}")
