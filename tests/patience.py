"""Waiting for what must happen, on a machine that may stand still for minutes or be shared."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

SECONDS = 300  # after which something hangs
STALL = 2.0  # seconds between two looks that count at most


def ticks(seconds: float = SECONDS, every: float = 0.05) -> Iterator[None]:
    """Again and again for so long, without the time in which the machine stood still."""
    spent, last = 0.0, time.monotonic()
    while spent < seconds:
        yield
        time.sleep(every)
        now = time.monotonic()
        spent, last = spent + min(now - last, STALL), now


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
