"""Children that tests start: each in a process group of its own, stopped by its id."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

START_SECONDS = 300
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

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        """Signal the group to end, kill what is left of it, and drop the log."""
        for each in (sign, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, each)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(20)
        Path(self.log).unlink(missing_ok=True)


def free_port() -> int:
    """A port of this machine's that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
