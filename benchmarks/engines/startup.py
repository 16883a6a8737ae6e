"""How long `vllm serve` takes until it is ready, and what its first request costs on top."""

import os
import time
from collections.abc import Iterator

import openai

from benchmarks.block_model import TINY
from benchmarks.engines.steps import SIDES
from benchmarks.report import Record, Run, console
from benchmarks.server import Server

ROUNDS = 2


def measure(run: Run) -> Iterator[Record]:
    """The shortest of both sides, alternating, eager."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS):
        for side, times in found.items():
            with console.status(f"starting vllm serve, {side}"):
                times.append(start(run, side))
    rows = {
        what: {side: min(times[i] for times in found[side]) for side in SIDES}
        for i, what in enumerate(("until ready", "first request minus second"))
    }
    rows["until ready"]["plugin / upstream"] = (
        rows["until ready"]["plugin"] / rows["until ready"]["upstream"]
    )
    yield run.record(
        "engines/startup",
        "How long until a server is ready?",
        "vllm serve --enforce-eager, the shipped checkpoint",
        dict.fromkeys(SIDES, "s") | {"plugin / upstream": ""},
        rows,
    )


def start(run: Run, side: str) -> tuple[float, float]:
    """Seconds until ready, and by how much the first request is slower than the second."""
    begin = time.perf_counter()
    env = os.environ | {"QWEN3NEXT_DISABLE": str(int(side == "upstream"))}
    log = run.out / f"startup-{side}.log"
    with Server(TINY, log, env, "--max-model-len", "4096") as server:
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
