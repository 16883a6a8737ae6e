"""Two servers of one core each behind a router, and one of two cores: conversations of turns."""

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from random import Random

import openai
from rich.progress import track

from benchmarks.block_model import TINY
from benchmarks.mtp.cases import CASES, Name
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server, free_port
from qwen3next_plugin.engines.vllm.cpu.cores import BIND

PYTHON = Path(".router/bin/python")
CLIENTS, TURNS, ROUNDS = 16, 4, 2
ANSWER = 48  # tokens
ONE, TWO = "one server", "two behind the router"


def measure(run: Run) -> Iterator[Record]:
    """Seconds of the same conversations, on all cores each time; the other servers are idle."""
    if not PYTHON.exists():
        console.print("replicas: left out, needs `make .router/.installed`")
        return
    cores = sorted(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {ONE: [], TWO: []}
    with ExitStack() as stack:
        bound = [cores, *([core] for core in cores[:2])]
        servers = [stack.enter_context(replica(run, each)) for each in bound]
        for server in servers:
            server.wait()
        router = stack.enter_context(routed(run, servers[1:]))
        for i in track(range(ROUNDS), "conversations", console=console):
            for side, url in ((ONE, servers[0].url), (TWO, router)):
                rates[side].append(talk(url, servers[0].model, seed=i))
    best = {side: max(found) for side, found in rates.items()}
    yield run.record(
        "fleet/replicas",
        "What do two replicas give?",
        "vLLM, eager, the shipped checkpoint",
        dict.fromkeys(best, "turns a second") | {f"{TWO} / {ONE}": ""},
        {
            f"{CLIENTS} clients, {TURNS} turns each": {
                **best,
                f"{TWO} / {ONE}": best[TWO] / best[ONE],
            }
        },
    )


def replica(run: Run, cores: list[int]) -> Server:
    """A server that computes on these cores."""
    log = run.out / f"fleet-replica-{'-'.join(map(str, cores))}.log"
    flags = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 30))
    env = os.environ | {BIND: ",".join(map(str, cores))}
    return Server(TINY, log, env, *flags, "--prefix-match-unit", "64")


@contextmanager
def routed(run: Run, servers: list[Server]) -> Iterator[str]:
    """The address of a router before them, once it has found both."""
    port = free_port()
    command = [str(PYTHON), "-m", "sglang_router.launch_router", "--port", str(port)]
    command += ["--policy", "cache_aware", "--prometheus-port", str(port + 1)]
    with (run.out / "fleet-router.log").open("w") as log:
        urls = [server.url for server in servers]
        process = subprocess.Popen([*command, "--worker-urls", *urls], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RedCheckError(f"the router has not found both servers: see {log.name}")
            with suppress(OSError), urllib.request.urlopen(f"{url}/workers", timeout=5) as answer:
                if f'"total":{len(servers)}' in answer.read().decode().replace(" ", ""):
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def talk(url: str, model: str, seed: int) -> float:
    """Turns a second of all clients, each of which asks as soon as it is answered."""
    options = {"api_key": "none", "max_retries": 0, "timeout": 600}

    def conversation(client: int) -> None:
        texts = CASES[Name.CHECKPOINT].texts(Random(f"{seed} {client}"))
        messages = []
        with openai.OpenAI(base_url=f"{url}/v1", **options) as asked:
            for text in islice(texts, TURNS):
                messages.append({"role": "user", "content": text})
                answer = asked.chat.completions.create(
                    model=model, messages=messages, max_tokens=ANSWER, temperature=0,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                content = answer.choices[0].message.content
                messages.append({"role": "assistant", "content": content})

    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(conversation, range(CLIENTS)))
    return CLIENTS * TURNS / (time.perf_counter() - begin)
