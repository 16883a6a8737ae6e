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
from pathlib import Path

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


def _start(model: Path, log: Path, side: str) -> tuple[float, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"QWEN3NEXT_DISABLE": str(int(side == "upstream"))}
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--enforce-eager"]
    command += ["--port", str(port), "--max-model-len", "4096"]
    start = time.perf_counter()
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, log)
        seconds = time.perf_counter() - start
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        times = [_request(client, str(model)) for _ in range(2)]
        return seconds, times[0] - times[1]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server stopped: see {log}")


def _request(client: openai.OpenAI, model: str) -> float:
    start = time.perf_counter()
    client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0)
    return time.perf_counter() - start
