"""Tokens per second of `vllm serve` on the shipped checkpoint, by clients and draft policy."""

import asyncio
import itertools
import json
import os
import random
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai

from benchmarks.engines.startup import Server
from benchmarks.engines.vllm import RedCheckError, console

MAX_DRAFT = 4
OFF, ADAPTIVE = "off", "adaptive"
POLICIES = {OFF: (0, "fixed")}
POLICIES |= {f"k = {k}": (k, "fixed") for k in range(1, MAX_DRAFT + 1)}
POLICIES[ADAPTIVE] = (MAX_DRAFT, "adaptive")
CLIENTS = (1, 4, 16)
MEMORY = 1 << 29  # of each server's KV cache
CHECKED = 40  # answers compared with those without drafts
SAME = 0.95  # share of them that must be equal: bf16, so that near ties may fall either way


def measure(model: Path, out: Path, *, quick: bool) -> dict[str, dict[str, float]]:
    """All policies in turn, round after round, each with the same prompts."""
    rounds, each, tokens = (3, 4, 96) if quick else (5, 6, 128)
    rates: dict[tuple[int, str], list[float]] = {}
    with servers(model, out) as running:
        same = check(running, CHECKED // 4 if quick else CHECKED)
        console.print(f"check: {min(same.values()):.0%} of the answers are those without drafts")
        for _ in range(1 + rounds):  # the first round warms up
            for clients in CLIENTS:
                for policy, server in running.items():
                    rate = throughput(server, clients, each, tokens)
                    rates.setdefault((clients, policy), []).append(rate)
        table = {f"{n} client{'s'[: n > 1]}": row(rates, n) for n in CLIENTS}
        table["acceptance by position, k = 4"] = acceptance(running[f"k = {MAX_DRAFT}"])
        table["mean draft length, adaptive"] = draft_length(running[ADAPTIVE])
    return table


@contextmanager
def servers(model: Path, out: Path) -> Iterator[dict[str, Server]]:
    """A server for each policy, all at once: the idle ones wait for their requests asleep."""
    with ExitStack() as stack:
        running = {}
        for policy, (k, drafts) in POLICIES.items():
            speculation = {"method": "mtp", "num_speculative_tokens": k}
            flags = ["--kv-cache-memory-bytes", str(MEMORY)]
            flags += ["--speculative-config", json.dumps(speculation)] if k else []
            env = os.environ | {"QWEN3NEXT_DRAFTS": drafts, "OMP_WAIT_POLICY": "passive"}
            log = out / f"clients-{policy.replace(' ', '')}.log"
            with console.status(f"starting {policy}"):
                server = stack.enter_context(Server(model, log, env, *flags))
                server.wait()
            running[policy] = server
        yield running


def prompts() -> Iterator[str]:
    """Beginnings of Python source, over and over."""
    source = Path(textwrap.__file__).read_text()
    return itertools.cycle(source[i : i + 300] for i in range(0, len(source) - 300, 171))


def ask(server: Server, batch: Sequence[str], tokens: Sequence[int], clients: int) -> list[str]:
    """The answers to all prompts, each so many tokens long, at most so many at a time."""

    async def all_of_them() -> list[str]:
        limit = asyncio.Semaphore(clients)
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def one(prompt: str, length: int) -> str:
                async with limit:
                    answer = await client.completions.create(
                        model=server.model,
                        prompt=prompt,
                        max_tokens=length,
                        temperature=0,
                        extra_body={"ignore_eos": True},
                    )
                return answer.choices[0].text

            return await asyncio.gather(*map(one, batch, tokens))

    return asyncio.run(all_of_them())


def check(running: dict[str, Server], count: int) -> dict[str, float]:
    """Share of each policy's answers that are those without drafts; raises where they are few."""
    batch = list(itertools.islice(prompts(), count))
    answers = {policy: ask(server, batch, [48] * count, 1) for policy, server in running.items()}
    same = {
        policy: statistics.fmean(a == b for a, b in zip(found, answers[OFF], strict=True))
        for policy, found in answers.items()
    }
    for policy, share in same.items():
        if share < SAME:
            raise RedCheckError(f"{policy}: only {share:.0%} of the answers are as without drafts")
    return same


def throughput(server: Server, clients: int, each: int, tokens: int) -> float:
    """Tokens per second when so many clients send `each` prompts one after the other.

    Answers are half to one and a half of `tokens` long. If all had one length, those without drafts
    would end together, and only their prompts would be read together.
    """
    count, chance = clients * each, random.Random(0)
    batch = list(itertools.islice(prompts(), count))
    lengths = [chance.randint(tokens // 2, tokens + tokens // 2) for _ in batch]
    start = time.perf_counter()
    ask(server, batch, lengths, clients)
    return sum(lengths) / (time.perf_counter() - start)


def row(rates: dict[tuple[int, str], list[float]], clients: int) -> dict[str, float]:
    """Median tokens per second of each policy, and of its rounds over those without drafts."""
    found = {policy: rates[clients, policy][1:] for policy in POLICIES}
    medians = {f"{policy}, tok/s": statistics.median(values) for policy, values in found.items()}
    over = {
        f"{policy} over off": statistics.median(
            [a / b for a, b in zip(values, found[OFF], strict=True)]
        )
        for policy, values in found.items()
        if policy != OFF
    }
    return medians | over


def acceptance(server: Server) -> dict[str, float]:
    """Share of the drafts made at each position that were accepted, given those before."""
    accepted = server.samples("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    drafts = sum(server.samples("vllm:spec_decode_num_drafts_total"))
    return {
        str(position): mine / before
        for position, (before, mine) in enumerate(itertools.pairwise([drafts, *accepted]), 1)
    }


def draft_length(server: Server) -> dict[str, float]:
    """Over all that was asked of it."""
    total, count = (
        sum(server.samples(f"vllm:qwen3next_draft_length_{part}")) for part in ("sum", "count")
    )
    return {"tokens": total / count}
