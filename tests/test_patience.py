"""Waiting: a machine that stands still is no hang; a process that does not end is one."""

import sys
import time

import pytest

import patience


def test_time_in_which_the_machine_stood_still_does_not_count(monkeypatch):
    clock = iter([0.0, 0.1, 900.0, 901.0, 901.5, 1901.0, 1902.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert len([*patience.ticks(seconds=6.0)]) == 6  # 0.1, 2, 1, 0.5, 2 and 1 s


def test_what_is_printed_until_the_end():
    """Also if that is later than the first look."""
    code = (
        "import sys, time; print(input()); time.sleep(1); print('x', file=sys.stderr); sys.exit(3)"
    )
    done = patience.run([sys.executable, "-c", code], input="said\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "x\n")


def test_a_process_that_hangs_fails_with_what_it_said(monkeypatch):
    monkeypatch.setattr(patience, "SECONDS", 0.5)
    code = "import time; print('here', flush=True); time.sleep(60)"
    with pytest.raises(AssertionError, match=r"does not end: .*here"):
        patience.run([sys.executable, "-c", code])
