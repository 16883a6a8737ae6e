"""Closed-loop clients of a server: tokens per second, and time to the first token.

A client sends its next request as soon as its answer is complete. Answers are streamed, eight
tokens at a time (`--stream-interval`), and counted while they arrive, so that a turn need not wait
until the last long answer is complete.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import openai

from benchmarks.server import Server

Now = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as text or as token ids, and how many tokens the answer has."""

    prompt: str | list[int]
    tokens: int


@dataclass
class Answer:
    """What has arrived so far."""

    request: Request
    text: str = ""
    tokens: int = 0


@dataclass
class Window:
    """Counts tokens from when all clients have their first one until `seconds` later.

    `whole` waits, after those seconds, for the first token of another answer. With one client the
    time is then that of whole answers, prompts included.
    """

    clients: int
    seconds: float
    whole: bool
    now: Now = time.perf_counter
    tokens: int = 0
    begin: float | None = None
    end: float | None = None
    served: set[int] = field(default_factory=set)

    def arrive(self, client: int, tokens: int, *, first: bool) -> None:
        """A client has received tokens; `first`: they begin an answer."""
        if self.end is not None:
            return
        now = self.now()
        if self.begin is None:
            self.served.add(client)
            if len(self.served) == self.clients:
                self.begin = now
            return
        self.tokens += tokens
        if now - self.begin >= self.seconds and (first or not self.whole):
            self.end = now

    @property
    def rate(self) -> float:
        """Tokens per second."""
        assert self.begin is not None
        assert self.end is not None
        return self.tokens / (self.end - self.begin)


@dataclass(frozen=True, slots=True)
class Load:
    """Measures one server."""

    server: Server

    async def answer(self, client: openai.AsyncOpenAI, request: Request) -> AsyncIterator[Answer]:
        """The answer so far, whenever more of it arrives."""
        usage = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.completions.create(
            model=self.server.model,
            prompt=request.prompt,
            max_tokens=request.tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "stream_options": usage},
        )
        so_far = Answer(request)
        async with stream:
            async for chunk in stream:
                if chunk.usage is not None:
                    so_far.tokens = chunk.usage.completion_tokens
                so_far.text += "".join(choice.text for choice in chunk.choices)
                yield so_far

    def rate(
        self, requests: Iterator[Request], clients: int, seconds: float, *, whole: bool
    ) -> tuple[float, list[Answer]]:
        """Tokens per second of so many closed-loop clients, and all answers, also cut-off ones."""
        window, answers = Window(clients, seconds, whole), list[Answer]()

        async def loop(name: int, client: openai.AsyncOpenAI) -> None:
            for request in requests:
                before = 0
                async for answer in self.answer(client, request):
                    if not before:
                        answers.append(answer)
                    if answer.tokens > before:
                        window.arrive(name, answer.tokens - before, first=not before)
                        before = answer.tokens
                    if window.end is not None:
                        return

        async def run() -> None:
            async with self.connected() as client:
                tasks = [asyncio.create_task(loop(i, client)) for i in range(clients)]
                done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in pending:
                    task.cancel()
                for task in [*done, *pending]:
                    with suppress(asyncio.CancelledError):
                        await task

        asyncio.run(run())
        self.server.settle()
        return window.rate, answers

    def first_token(self, request: Request) -> tuple[float, Answer]:
        """Seconds until the first token of an answer, and the whole answer."""

        async def run() -> tuple[float, Answer]:
            async with self.connected() as client:
                began = time.perf_counter()
                stream = self.answer(client, request)
                answer = await anext(stream)
                seconds = time.perf_counter() - began
                async for more in stream:
                    answer = more
                return seconds, answer

        return asyncio.run(run())

    def texts(self, requests: Sequence[Request]) -> list[str]:
        """The texts of all answers, one after the other."""
        return [self.first_token(request)[1].text for request in requests]

    def connected(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=600
        )


def staggered(requests: Iterator[Request], clients: int) -> Iterator[Request]:
    """Shorten each client's first answer, so that not all of them end at once."""
    for i, request in enumerate(itertools.islice(requests, clients), 1):
        yield Request(request.prompt, max(1, request.tokens * i // clients))
    yield from requests
