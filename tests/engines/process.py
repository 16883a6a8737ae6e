"""Children that tests start: each in a process group of its own, stopped by its id."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from random import SystemRandom
from typing import Any

from patience import ticks

START_SECONDS = 600
SHOWN = 6000  # characters of a log
TESTS = str(Path(__file__).parents[1])
CPUS = sorted(os.sched_getaffinity(0))
# Those of an engine: where tests run side by side, each pytest worker's has its own.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
OWN_CPUS = CPUS[WORKER::WORKERS] or CPUS


class Process:
    """A child in a process group of its own, its output in a file; stopped by its id."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        handle, self.log = tempfile.mkstemp(prefix="engine-", suffix=".log")
        self.child = subprocess.Popen(
            arguments, env=env, stdout=handle, stderr=handle, start_new_session=True
        )
        os.close(handle)

    def text(self) -> str:
        """Everything the child has written."""
        return Path(self.log).read_text(errors="replace")

    def code(self) -> int | None:
        """The exit code of the child; None: it runs."""
        return self.child.poll()

    def wait(self, seconds: float) -> None:
        """Wait for the child to end, at most so long."""
        for _ in ticks(seconds):
            if self.code() is not None:
                return

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """Signal the group to end, kill what is left of it, and drop the log; again: nothing."""
        for each in (sign, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, each)
            self.wait(20)
        if os.path.exists(self.log):
            print(self.text()[-SHOWN:])  # pytest shows it where the test failed
            os.unlink(self.log)


class Fork(Process):
    """The same, forked from a process that has already imported the host.

    Importing a host takes more than half of the time that an engine takes to start.
    """

    CONTEXT = multiprocessing.get_context("forkserver")

    def __init__(self, target: Callable[..., None], *arguments: Any, env: dict[str, str]) -> None:
        handle, self.log = tempfile.mkstemp(prefix="engine-", suffix=".log")
        os.close(handle)
        self.child = self.CONTEXT.Process(
            target=_forked, args=(self.log, env, target, *arguments), daemon=False
        )
        self.child.start()

    @classmethod
    def preload(cls, modules: list[str], env: dict[str, str]) -> None:
        """Start the server, with `modules` imported in the environment `env`."""
        cls.CONTEXT.set_forkserver_preload(modules)
        before = dict(os.environ)
        # Its resource tracker outlives forks, and would report what those that are stopped leave;
        # hosts warn of what a machine without a GPU lacks.
        quiet = {"PYTHONWARNINGS": "ignore::UserWarning"}
        os.environ.update(env | quiet | {"PYTHONPATH": TESTS})
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def code(self) -> int | None:
        return self.child.exitcode


def _forked(log: str, env: dict[str, str], target: Callable[..., None], *arguments: Any) -> None:
    """What a fork does before its `target`: its own group, output and environment."""
    os.setsid()
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    target(*arguments)


def script(path: str, *arguments: str) -> None:
    """What `python path arguments` does."""
    sys.argv[:] = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def free_port() -> int:
    """A port of this machine's that nobody listens on.

    None of those that the kernel gives to outgoing connections: one of them, a client's that waits
    for the server for instance, could have taken it before the server listens. Each worker of
    pytest-xdist has its own range: SGLang also listens on ports up to a thousand above its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = 15_000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = 15_000 + worker * own + SystemRandom().randrange(max(own - 1_000, own // 2))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
