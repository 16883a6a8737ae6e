"""Tokens per second that clients get from a server with drafts and without, in any engine."""

import asyncio
import itertools
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
from rich.progress import track

from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server

OFF, ADAPTIVE = "off", "adaptive"
CLIENTS = (1, 4, 16)
CHECKED = 40  # answers compared with those without drafts
SAME = 0.95  # share of them that must be equal: in bf16, near ties may fall either way
Rates = dict[tuple[int, str], list[float]]  # (clients, policy) → tokens per second of each round


@contextmanager
def running(
    start: Callable[[str], Server], policies: Sequence[str], *, together: bool
) -> Iterator[dict[str, Server]]:
    """A ready server for each policy; all stop at the end.

    The idle ones sleep while another is measured. Starting them together is quicker, and takes
    more memory at once.
    """
    with ExitStack() as stack:
        servers = {}
        for policy in policies:
            servers[policy] = stack.enter_context(start(policy))
            if not together:
                wait(policy, servers[policy])
        for policy, server in servers.items():
            wait(policy, server)
        yield servers


def wait(policy: str, server: Server) -> None:
    with console.status(f"starting the server: {policy}"):
        server.wait()


def compare(run: Run, name: str, case: str, servers: dict[str, Server]) -> Iterator[Record]:
    """Check the answers, then measure all policies in turn, each round with the same prompts."""
    clients = (1, 4) if run.quick else CLIENTS
    rounds, each, tokens = (2, 2, 48) if run.quick else (5, 6, 128)
    same = check(servers, CHECKED // 5 if run.quick else CHECKED)
    console.print(
        f"check: at least {min(same.values()):.0%} of the answers are those without drafts"
    )
    rates: Rates = {}
    turns = list(itertools.product(range(1 + rounds), clients, servers))
    for round_, count, policy in track(turns, f"{name}: requests", console=console):
        rate = throughput(servers[policy], count, each, tokens)
        if round_:  # the first round warms up
            rates.setdefault((count, policy), []).append(rate)
    yield run.record(
        name,
        "How fast are answers?",
        case,
        dict.fromkeys(servers, "tok/s"),
        {plural(n): {policy: statistics.median(rates[n, policy]) for policy in servers}
         for n in clients},
    )  # fmt: skip
    drafting = [policy for policy in servers if policy != OFF]
    yield run.record(
        f"{name}_over_off",
        "How much faster than without drafts?",
        f"{case}; medians of the rounds' ratios",
        dict.fromkeys(drafting, ""),
        {plural(n): {policy: over_off(rates, n, policy) for policy in drafting} for n in clients},
    )


def plural(clients: int) -> str:
    return f"{clients} client{'s'[: clients > 1]}"


def over_off(rates: Rates, clients: int, policy: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(rates[clients, policy], rates[clients, OFF], strict=True)
    return statistics.median(a / b for a, b in pairs)


def prompts() -> Iterator[str]:
    """Beginnings of Python source, over and over."""
    source = Path(textwrap.__file__).read_text()
    return itertools.cycle(source[i : i + 300] for i in range(0, len(source) - 300, 171))


def ask(server: Server, batch: Sequence[str], tokens: Sequence[int], clients: int) -> list[str]:
    """Answers to all prompts, of the given lengths, by so many clients at once."""

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


def check(servers: dict[str, Server], count: int) -> dict[str, float]:
    """Share of each policy's answers that equal those without drafts; raises if it is too low."""
    batch = list(itertools.islice(prompts(), count))
    answers = {
        policy: ask(server, batch, [48] * count, 1)
        for policy, server in track(servers.items(), "check of the answers", console=console)
    }
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

    Answers are half to one and a half of `tokens` long. With equal lengths, all answers without
    drafts would end at once, and prompts would be read together only there.
    """
    count, chance = clients * each, random.Random(0)
    batch = list(itertools.islice(prompts(), count))
    lengths = [chance.randint(tokens // 2, tokens + tokens // 2) for _ in batch]
    start = time.perf_counter()
    ask(server, batch, lengths, clients)
    return sum(lengths) / (time.perf_counter() - start)
