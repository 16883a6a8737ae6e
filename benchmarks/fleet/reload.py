"""Other weights while serving: seconds of a reload, over those of the same server's own load."""

import json
import os
import re
import statistics
import time
import urllib.request
from collections.abc import Iterator

from benchmarks.block_model import TINY, block_model
from benchmarks.mtp.load import Load, Request
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server
from benchmarks.worker import prompts, vocabulary

ROUNDS = 5
LOADED = re.compile(r"(?:Initializing model|Loading weights) took ([\d.]+) seconds")
MODELS = {
    "the shipped checkpoint": lambda run: TINY,
    "the block model": lambda run: block_model(run.out / "block-model"),
}


def measure(run: Run) -> Iterator[Record]:
    """Reloads of the weights that are served, by which the answers stay the same."""
    rows = {}
    for name, written in MODELS.items():
        model = written(run)
        env = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        flags = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 29))
        speculation = json.dumps({"method": "mtp", "num_speculative_tokens": 3})
        log = run.out / "fleet-reload.log"
        with Server(model, log, env, *flags, "--speculative-config", speculation) as server:
            with console.status(f"starting vllm serve: {name}"):
                server.wait()
            before = answers(server)
            seconds = statistics.median(reload(server) for _ in range(ROUNDS))
            if answers(server) != before:
                raise RedCheckError("answers differ after a reload of the same weights")
        load = sum(map(float, LOADED.findall(log.read_text())))
        if not load:
            raise RedCheckError(f"{log} does not say how long loading took")
        rows[name] = {"load": load, "reload": seconds, "reload / load": seconds / load}
    yield run.record(
        "fleet/reload",
        "How long is a reload of the weights?",
        "vLLM, eager, with the MTP layer",
        {"load": "s", "reload": "s", "reload / load": ""},
        rows,
    )


def reload(server: Server) -> float:
    """Seconds of one reload."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": server.model}}
    request = urllib.request.Request(f"{server.url}/collective_rpc", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    begin = time.perf_counter()
    urllib.request.urlopen(request, timeout=600).close()
    return time.perf_counter() - begin


def answers(server: Server) -> list[list[str]]:
    """Greedy ones, of random prompts."""
    batch = [Request(prompt, 16) for prompt in prompts((3, 65, 200), vocabulary(server.model))]
    return [choices.tokens for choices in Load(server).choices(batch)]
