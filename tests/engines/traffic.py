"""Many clients at once: real requests to a real server, some of which hang up."""

import asyncio
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.server import Server

BLOCKS = (256, 384)  # tokens in vLLM's block of the shipped checkpoint, in fp32 and in bf16


@dataclass(frozen=True)
class Request:
    """A greedy request by token ids; `hang_up` after so many chunks of its stream."""

    prompt: tuple[int, ...]
    tokens: int
    hang_up: int | None = None
    ignore_eos: bool = True


def source_tokens() -> list[int]:
    """Python source as the shipped checkpoint's tokens: text that it has something to say about."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    return tokenizer.encode(Path(textwrap.__file__).read_text()).ids


def requests(
    count: int, *, seed: int, abort_share: float, tokens: int = 48, longest: int = 700
) -> list[Request]:
    """Mixed lengths, mostly short; every fourth prompt begins like another one.

    Every sixth answer crosses into its next block, and preempts another where memory is full.
    """
    rng, ids = random.Random(seed), source_tokens()
    found: list[Request] = []
    for i in range(count):
        length, most = min(longest, int(rng.paretovariate(0.6))), rng.randrange(1, tokens + 1)
        if i % 6 == 1:
            length, most = rng.choice(BLOCKS) - rng.randrange(1, tokens // 2), tokens
        start = 0 if i % 4 == 0 else rng.randrange(len(ids) - length)
        prompt = tuple(ids[start : start + length])
        hang_up = rng.randrange(1, 4) if rng.random() < abort_share else None
        found.append(Request(prompt, most, hang_up))
    return found


def growing(count: int, block: int) -> list[Request]:
    """`count` requests that each need another block of `block` tokens for their answer.

    Where memory is full when they run side by side, one of them preempts another.
    """
    ids = source_tokens()
    return [Request(tuple(ids[20 * i :][: block - 8 - i]), 32) for i in range(count)]


def send(server: Server, batch: Sequence[Request], clients: int) -> list[tuple[int, ...] | None]:
    """The token ids that each request got; None for those that hung up."""

    async def ask(client: openai.AsyncOpenAI, request: Request) -> tuple[int, ...] | None:
        options = {
            "model": server.model,
            "prompt": list(request.prompt),
            "max_tokens": request.tokens,
            "temperature": 0,
            "extra_body": {"ignore_eos": request.ignore_eos, "return_token_ids": True},
        }
        if request.hang_up is None:
            answer = await client.completions.create(**options)
            return tuple(answer.choices[0].token_ids)
        stream = await client.completions.create(**options, stream=True)
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks == request.hang_up:
                break
        await stream.close()
        return None

    async def all_of_them() -> list[tuple[int, ...] | None]:
        queue: Iterator[tuple[int, Request]] = iter(enumerate(batch))
        answers: list[tuple[int, ...] | None] = [None] * len(batch)
        async with openai.AsyncOpenAI(**server.openai_options()) as client:

            async def work() -> None:
                for i, request in queue:
                    answers[i] = await ask(client, request)

            await asyncio.gather(*(work() for _ in range(clients)))
        return answers

    return asyncio.run(all_of_them())
