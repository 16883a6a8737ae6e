"""The limit of time on a `stop_regex`."""

import threading
import time

from qwen3next_plugin.extras.host_fixes.sglang.patterns import _time_limit


def test_no_alarm_comes_after_its_limit():
    """Neither as an error somewhere else nor as the signal's own end of the process."""
    over, ended = 0, threading.Event()

    def compute() -> None:
        while not ended.wait(1e-5):
            pass

    others = [threading.Thread(target=compute) for _ in range(8)]  # that may get the signal
    for each in others:
        each.start()
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            try:
                with _time_limit(0):
                    sum(range(50))
            except TimeoutError:
                over += 1
    finally:
        ended.set()
        for each in others:
            each.join()
    assert over
