"""Answers beside a neighbour's long prompts: one server of two cores, and prefill on its own."""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

from rich.progress import track

from benchmarks.block_model import block_model
from benchmarks.mtp.load import Load, Request
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server, free_port
from benchmarks.worker import prompts, vocabulary
from qwen3next_plugin.engines.vllm.cpu.cores import BIND

LONG, SHORT, ANSWER = 8192, 32, 64  # tokens
SLICE = 512  # tokens of a prompt that a step reads
CLIENTS, SECONDS, ROUNDS = 2, 60.0, 2
ENOUGH = 100  # times between tokens, of which one in a hundred is longer than p99
TOGETHER, APART = "together", "apart"
HITS = "vllm:external_prefix_cache_hits_total"
PREFILL_ONLY = {"do_remote_decode": True, "do_remote_prefill": False}
Sides = dict[str, tuple[Server, Server]]  # the server that answers, and the one that reads prompts


def measure(run: Run) -> Iterator[Record]:
    """Times between tokens of clients while a neighbour sends long prompts, in turn."""
    model = block_model(run.out / "block-model")
    cores = sorted(os.sched_getaffinity(0))[:2]
    waits: dict[str, list[float]] = {TOGETHER: [], APART: []}
    read = dict.fromkeys(waits, 0)
    with ExitStack() as stack:
        enter = stack.enter_context
        whole = enter(served(run, model, cores))
        first = enter(served(run, model, cores[:1], "kv_producer"))
        second = enter(served(run, model, cores[1:], "kv_consumer"))
        for server in (whole, first, second):
            server.wait()
        sides: Sides = {TOGETHER: (whole, whole), APART: (second, first)}
        (prompt,) = prompts([LONG], vocabulary(str(model)))
        check(sides, prompt)
        long = ([i, *prompt[1:]] for i in count(2))
        for _ in track(range(ROUNDS), "answers beside long prompts", console=console):
            for side, servers in sides.items():
                found, done = asyncio.run(between(*servers, long))
                waits[side] += found
                read[side] += done
                for server in servers:
                    settle(server)
    if min(map(len, waits.values())) < ENOUGH:
        raise RedCheckError(f"fewer than {ENOUGH} times between tokens")
    p99 = {side: statistics.quantiles(found, n=100)[-1] for side, found in waits.items()}
    prompts_read = {f"{side}, prompts read": float(n) for side, n in read.items()}
    yield run.record(
        "fleet/apart",
        "How long do answers wait for a neighbour's prompts of 8,192?",
        f"vLLM, eager, the block model, bf16, slices of {SLICE} tokens; apart: a core each",
        dict.fromkeys(p99, "s") | {f"{APART} / {TOGETHER}": ""} | dict.fromkeys(prompts_read, ""),
        {
            f"time between tokens, p99, {CLIENTS} clients": {
                **p99, f"{APART} / {TOGETHER}": p99[APART] / p99[TOGETHER], **prompts_read,
            }
        },
    )  # fmt: skip


def served(run: Run, model: Path, cores: list[int], role: str | None = None) -> Server:
    """A server that computes on these cores; `role`: of the two that are apart."""
    flags = ["--max-model-len", "9000", "--kv-cache-memory-bytes", str(3 << 29)]
    flags += ["--max-num-batched-tokens", str(SLICE)]
    if role is not None:
        transfer = {"kv_connector": "NixlConnector", "kv_role": role}
        flags += ["--kv-transfer-config", json.dumps(transfer)]
    env = os.environ | {
        BIND: ",".join(map(str, cores)),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }
    return Server(model, run.out / f"fleet-apart-{role or 'together'}.log", env, *flags)


def check(sides: Sides, prompt: list[int]) -> None:
    """Both ways give the same answer to a long prompt, which is handed over.

    Raises:
        RedCheckError: if not.
    """
    before = handed_over(sides[APART][0])
    answers = [asyncio.run(neighbour(*servers, prompt, ANSWER)) for servers in sides.values()]
    if answers[0] != answers[1]:
        raise RedCheckError("an answer whose prompt was read elsewhere differs")
    if (tokens := handed_over(sides[APART][0]) - before) != LONG - 1:
        raise RedCheckError(f"{tokens:.0f} tokens of a prompt of {LONG:,} were handed over")


def handed_over(server: Server) -> float:
    """Tokens of prompts that another server has computed."""
    return sum(server.samples(HITS, "engine").values())


async def between(
    answering: Server, reading: Server, long: Iterator[list[int]]
) -> tuple[list[float], int]:
    """Seconds between tokens of clients that ask for answers all the time.

    A neighbour's prompts are read one after the other meanwhile; returns how many were.
    """
    found: list[float] = []
    done = 0

    async def client(name: int) -> None:
        load = Load(answering)
        async with load.connected() as connected:
            for i in count():
                request = Request([*range(2, 1 + SHORT), 1000 + 100 * name + i], 8 * ANSWER)
                last = None
                async for answer in load.answer(connected, request):
                    now = time.perf_counter()
                    if last is not None and answer.tokens > last[1]:
                        found.append(now - last[0])
                    last = now, answer.tokens

    async def others() -> None:
        nonlocal done
        for prompt in long:
            await neighbour(answering, reading, prompt, 1)
            done += 1

    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            group.create_task(others())
            for name in range(CLIENTS):
                group.create_task(client(name))
    return found, done


def settle(server: Server) -> None:
    """Return when what clients have left no longer runs."""
    while sum(server.samples("vllm:num_requests_running", "engine").values()):
        time.sleep(0.2)
    time.sleep(3)  # a step of a slice ends


async def neighbour(answering: Server, reading: Server, prompt: list[int], tokens: int) -> str:
    """The answer to a prompt that `reading` reads; a proxy would ask the same of both."""
    body = {"prompt": prompt, "temperature": 0}
    more: dict[str, object] = {"ignore_eos": True}
    if reading is not answering:
        async with Load(reading).connected() as first:
            read = await first.completions.create(
                model=reading.model, max_tokens=1, **body,
                extra_body=more | {"kv_transfer_params": PREFILL_ONLY},
            )  # fmt: skip
        more["kv_transfer_params"] = read.kv_transfer_params
    async with Load(answering).connected() as second:
        answer = await second.completions.create(
            model=answering.model, max_tokens=tokens, **body, extra_body=more
        )
    return answer.choices[0].text
