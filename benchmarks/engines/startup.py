"""How long `vllm serve` takes until it is ready, and what its first request costs on top."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import openai

from benchmarks.block_model import TINY
from benchmarks.engines.steps import SIDES
from benchmarks.report import Record, Run, console
from benchmarks.server import Server


def measure(run: Run) -> Iterator[Record]:
    """Medians of both sides, alternating, eager."""
    ready: dict[str, list[float]] = {side: [] for side in SIDES}
    first: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(1 if run.quick else 3):
        for side in SIDES:
            with console.status(f"starting vllm serve, {side}"):
                seconds, extra = start(TINY, run.out / f"startup-{side}.log", side)
            ready[side].append(seconds)
            first[side].append(extra)
    until_ready = {side: statistics.median(times) for side, times in ready.items()}
    yield run.record(
        "engines/startup",
        "How long until a server is ready?",
        "vllm serve --enforce-eager, the shipped checkpoint",
        dict.fromkeys(SIDES, "s") | {"plugin / upstream": ""},
        {
            "until ready": until_ready
            | {"plugin / upstream": until_ready["plugin"] / until_ready["upstream"]},
            "first request minus second": {
                side: statistics.median(times) for side, times in first.items()
            },
        },
    )


def start(model: Path, log: Path, side: str) -> tuple[float, float]:
    """Seconds until ready, and by how much the first request is slower than the second."""
    begin = time.perf_counter()
    env = os.environ | {"QWEN3NEXT_DISABLE": str(int(side == "upstream"))}
    with Server(model, log, env, "--max-model-len", "4096") as server:
        server.wait()
        seconds = time.perf_counter() - begin
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        times = [request(client, server.model) for _ in range(2)]
        return seconds, times[0] - times[1]


def request(client: openai.OpenAI, model: str) -> float:
    """Seconds of one short completion."""
    begin = time.perf_counter()
    client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0)
    return time.perf_counter() - begin
