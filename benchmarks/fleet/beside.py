"""A stream beside a neighbour's long prompts, and short prompts between, in either engine.

`python -m benchmarks.fleet.beside MODEL --engine sglang` measures any model, with the engine's
flags behind `--`.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated

import openai
import typer

from benchmarks.block_model import block_model
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.server import Server, SGLangServer
from benchmarks.worker import prompts, vocabulary

LONG, SHORT, ANSWER = 8192, 32, 4096  # tokens
SECONDS, ALONE, EVERY = 60.0, 2, 9.0  # of a turn, at least; long prompts alone; between short ones
ENOUGH = 20  # times between tokens: twice as many at least
GIVE_UP = 10  # after so many times a turn's seconds
BUDGET = "QWEN3NEXT_STEP_SECONDS"
SIDES = {"budget": "1.0", "chunks": "0"}  # the engine's own chunks
FLAGS = {
    "vllm": ("--max-model-len", "16384", "--kv-cache-memory-bytes", str(3 << 29)),
    "sglang": ("--context-length", "16384", "--max-total-tokens", "40000"),
}
KINDS = {"vllm": Server, "sglang": SGLangServer}


@dataclass
class Found:
    """Seconds."""

    tokens: int  # of a long prompt
    gaps: list[float] = field(default_factory=list)  # between the pieces of the stream
    beside: list[float] = field(default_factory=list)  # to read a long prompt beside it
    alone: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)  # to the first token of a short prompt

    def row(self) -> dict[str, float]:
        return {
            "time between tokens, p99": statistics.quantiles(self.gaps, n=100, method="inclusive")[
                -1
            ],
            "longest": max(self.gaps),
            "first token of a short prompt": max(self.short),
            f"prompt of {self.tokens:,} beside the stream": statistics.median(self.beside),
            f"prompt of {self.tokens:,} alone": statistics.median(self.alone),
        }


class Clients:
    """Those of a server."""

    def __init__(self, server: Server, seconds: float, long: int) -> None:
        self.server, self.seconds, self.found = server, seconds, Found(long)
        (self.ids,) = prompts([long], vocabulary(server.model))
        self.names = count(2)

    async def pieces(self, prompt: Sequence[int], tokens: int, into: list[float]) -> None:
        """Ask and note the seconds from one piece to the next; the first from the request."""
        async with openai.AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key="none", timeout=None, max_retries=0
        ) as client:
            last = time.perf_counter()
            stream = await client.completions.create(
                model=self.server.model,
                prompt=[next(self.names), *prompt],
                max_tokens=tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                now = time.perf_counter()
                into.append(now - last)
                last = now

    async def first_token(self, tokens: int, into: list[float]) -> None:
        await self.pieces(self.ids[: tokens - 1], 1, own := [])
        into.append(own[0])

    async def turn(self) -> None:
        """A stream, long prompts one after the other, and now and then a short one."""
        await self.first_token(self.found.tokens, [])  # to warm up
        for _ in range(ALONE):
            await self.first_token(self.found.tokens, self.found.alone)

        async def stream() -> None:
            while True:
                await self.pieces(self.ids[:SHORT], ANSWER, self.found.gaps)

        async def long() -> None:
            while True:
                await self.first_token(self.found.tokens, self.found.beside)

        async def short() -> None:
            while True:
                await asyncio.sleep(EVERY)
                await self.first_token(SHORT, self.found.short)

        began = time.perf_counter()
        tasks = [asyncio.create_task(work()) for work in (stream, long, short)]
        while (took := time.perf_counter() - began) < self.seconds or not self.is_enough():
            if took > GIVE_UP * self.seconds:
                raise RedCheckError("the server does not serve three clients side by side")
            done, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises: none of them ends
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_enough(self) -> bool:
        found = self.found
        return min(len(found.beside), len(found.short), len(found.gaps) // ENOUGH) >= 2


def measure(run: Run) -> Iterator[Record]:
    """Both engines with the budget and without."""
    model = block_model(run.out / "block-model")
    for engine in KINDS:
        rows = {side: turn(run.out, model, engine, side) for side in SIDES}
        yield run.record(
            f"fleet/beside/{engine}",
            f"How long does a stream stand still beside prompts of 8,192, {engine}?",
            f"{engine}, the block model, bf16; budget: {BUDGET}={SIDES['budget']}; chunks: 0",
            dict.fromkeys(SIDES, "s"),
            {row: {side: rows[side][row] for side in SIDES} for row in rows["budget"]},
        )


def turn(
    out: Path,
    model: Path,
    engine: str,
    side: str,
    flags: Sequence[str] = (),
    seconds: float = SECONDS,
    long: int = LONG,
) -> dict[str, float]:
    log = out / f"fleet-beside-{engine}-{side}.log"
    env = os.environ | {BUDGET: SIDES[side]}
    with KINDS[engine](model, log, env, *(flags or FLAGS[engine])) as server:
        server.wait()
        clients = Clients(server, seconds, long)
        asyncio.run(clients.turn())
    return clients.found.row()


def main(
    model: Path,
    flags: Annotated[list[str] | None, typer.Argument(help="Of the engine, behind --.")] = None,
    engine: str = "vllm",
    side: Annotated[list[str] | None, typer.Option(help=", ".join(SIDES))] = None,
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = SECONDS,
    long: Annotated[int, typer.Option(help="Tokens of a long prompt.")] = LONG,
    out: Path = Path("out"),
) -> None:
    """Measure a server of any model."""
    out.mkdir(exist_ok=True)
    for one in side or SIDES:
        for row, found in turn(out, model, engine, one, flags or (), seconds, long).items():
            console.print(f"{engine}, {one}: {row}: {found:.3f} s")


if __name__ == "__main__":
    typer.run(main)
