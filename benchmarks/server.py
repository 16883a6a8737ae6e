"""The engines' own servers, in process groups of their own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.worker import SGLANG_PYTHON


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`vllm serve` on a free port; ends with its context."""

    ENGINE = "vllm"  # what its metrics' names begin with

    def __init__(self, model: Path, log: Path, env: Mapping[str, str], *flags: str) -> None:
        port = free_port()
        self.url, self.model, self.log = f"http://127.0.0.1:{port}", str(model), log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*self.command(), "--port", str(port), *flags],
                stdout=file,
                stderr=file,
                env=env,
                start_new_session=True,
            )

    def command(self) -> list[str]:
        vllm = str(Path(sys.executable).parent / "vllm")
        return [vllm, "serve", self.model, "--enforce-eager"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def wait(self) -> None:
        """Return when the server is healthy."""
        while self.process.poll() is None:
            try:
                self.get("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"the server stopped: see {self.log}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return answer.read().decode()

    def settle(self) -> None:
        """Return when nothing runs any more after clients have left in the middle of answers."""
        time.sleep(0.3)  # they are noticed at once, and the step under way ends

    def samples(self, name: str, label: str) -> dict[str, float]:
        """The values of a Prometheus sample, by a label."""
        found = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith(f"{name}{{") and (value := re.search(f'{label}="([^"]*)"', line)):
                found[value[1]] = float(line.rsplit(" ", 1)[1])
        return found


class SGLangServer(Server):
    """`sglang.launch_server`, without its own first request: random models know no text."""

    ENGINE = "sglang"

    def command(self) -> list[str]:
        launch = [str(SGLANG_PYTHON.absolute()), "-m", "sglang.launch_server"]
        return [*launch, "--model-path", self.model, "--skip-server-warmup"]

    def settle(self) -> None:
        """End what clients have left: SGLang itself goes on for two seconds."""
        body = json.dumps({"abort_all": True}).encode()
        abort = urllib.request.Request(f"{self.url}/abort_request", body)
        abort.add_header("Content-Type", "application/json")
        urllib.request.urlopen(abort, timeout=5).close()
        while self.unfinished():
            time.sleep(0.05)

    def unfinished(self) -> int:
        """The number of requests that run or wait."""
        (load,) = json.loads(self.get("/v1/loads"))["loads"]
        return load["num_running_reqs"] + load["num_waiting_reqs"]
