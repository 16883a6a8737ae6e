"""How long `vllm serve` takes until it is ready, and what its first request costs on top."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import openai
from rich.console import Console

console = Console(stderr=True)


def start_up_times(model: Path, out: Path, rounds: int) -> dict[str, float]:
    """Seconds until ready of each side, alternating, eager; and of the first and second request."""
    ready: dict[str, list[float]] = {"upstream": [], "plugin": []}
    first: dict[str, list[float]] = {"upstream": [], "plugin": []}
    for _ in range(rounds):
        for side, times in ready.items():
            with console.status(f"starting {side}"):
                seconds, extra = _start(model, out / f"startup-{side}.log", side)
            times.append(seconds)
            first[side].append(extra)
    row = {f"{side} s": statistics.median(times) for side, times in ready.items()}
    row["ratio"] = row["plugin s"] / row["upstream s"]
    for side, times in first.items():
        row[f"{side} first request over second, s"] = statistics.median(times)
    return row


class Server:
    """`vllm serve` in a process group of its own, on a free port; ends with its context."""

    def __init__(self, model: Path, log: Path, env: Mapping[str, str], *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
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
        return [vllm, "serve", self.model, "--enforce-eager", "--max-model-len", "4096"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def wait(self) -> None:
        """Return when it is healthy."""
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

    def samples(self, name: str) -> list[float]:
        """The values of a Prometheus sample, one for each set of labels."""
        lines = self.get("/metrics").splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{")]


def _start(model: Path, log: Path, side: str) -> tuple[float, float]:
    start = time.perf_counter()
    env = os.environ | {"QWEN3NEXT_DISABLE": str(int(side == "upstream"))}
    with Server(model, log, env) as server:
        server.wait()
        seconds = time.perf_counter() - start
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        times = [_request(client, server.model) for _ in range(2)]
        return seconds, times[0] - times[1]


def _request(client: openai.OpenAI, model: str) -> float:
    start = time.perf_counter()
    client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0)
    return time.perf_counter() - start
