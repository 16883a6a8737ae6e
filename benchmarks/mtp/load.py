"""Closed-loop clients of a server: tokens per second, and time to the first token.

A client sends its next request as soon as its answer is complete. Answers are streamed, eight
tokens at a time (`--stream-interval`), and counted while they arrive, so that a turn need not wait
until the last long answer is complete.
"""

import asyncio
import itertools
import math
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


@dataclass(frozen=True, slots=True)
class Choices:
    """The tokens of a greedy answer, and log-probabilities of the two likeliest at each."""

    tokens: list[str]
    likeliest: list[dict[str, float]]

    def gap_to(self, other: "Choices") -> float:
        """How much likelier the first token is that `other` has not; 0 if it has all of them.

        It is infinite for an answer that goes on with neither of the two likeliest tokens.
        """
        for token, found, likeliest in zip(self.tokens, other.tokens, self.likeliest, strict=False):
            if token != found:
                return likeliest[token] - likeliest.get(found, -math.inf)
        return 0.0 if len(self.tokens) == len(other.tokens) else math.inf


@dataclass
class Window:
    """Counts tokens from when all clients have their first one until `seconds` later.

    Tokens that arrive together count as made evenly since the client's last ones: clients in step
    receive theirs at the same moment, just before the end or just after it.

    `whole` waits, after those seconds, for the first token of another answer. With one client the
    time is then that of whole answers, prompts included.
    """

    clients: int
    seconds: float
    whole: bool
    now: Now = time.perf_counter
    tokens: float = 0
    begin: float = math.inf
    end: float = math.inf
    served: set[int] = field(default_factory=set)
    last: dict[int, float] = field(default_factory=dict)  # client → when its last tokens arrived

    def arrive(self, client: int, tokens: int, *, first: bool) -> None:
        """A client has received tokens; `first`: they begin an answer."""
        now = self.now()
        since = now if first else self.last[client]
        self.last[client] = now
        self.served.add(client)
        if self.begin < math.inf:
            if self.whole and first and now >= self.begin + self.seconds:
                self.end = min(self.end, now)
            self.tokens += tokens * self.share(since, now)
        elif len(self.served) == self.clients:
            self.begin = now
            self.end = math.inf if self.whole else now + self.seconds

    def share(self, since: float, now: float) -> float:
        """The part of this time that is within the window."""
        if since == now:
            return float(now <= self.end)
        return max(0.0, min(now, self.end) - max(since, self.begin)) / (now - since)

    def finish(self, client: int) -> None:
        """A client has its whole answer."""
        del self.last[client]

    @property
    def closed(self) -> bool:
        """Whether every token of the window has arrived."""
        return min(self.last.values(), default=-math.inf) >= self.end

    @property
    def rate(self) -> float:
        """Tokens per second."""
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
                    if window.closed:
                        return
                window.finish(name)

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

    def choices(self, requests: Sequence[Request]) -> list[Choices]:
        """The answers to all requests, one after the other."""

        async def run() -> list[Choices]:
            async with self.connected() as client:
                return [await self.choice(client, request) for request in requests]

        return asyncio.run(run())

    async def choice(self, client: openai.AsyncOpenAI, request: Request) -> Choices:
        answer = await client.completions.create(
            model=self.server.model,
            prompt=request.prompt,
            max_tokens=request.tokens,
            temperature=0,
            logprobs=2,
            extra_body={"ignore_eos": True},
        )
        found = answer.choices[0].logprobs
        assert found is not None
        return Choices(found.tokens or [], found.top_logprobs or [])

    def connected(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=600
        )


def staggered(requests: Iterator[Request], clients: int) -> Iterator[Request]:
    """Shorten each client's first answer, so that not all of them end at once."""
    for i, request in enumerate(itertools.islice(requests, clients), 1):
        yield Request(request.prompt, max(1, request.tokens * i // clients))
    yield from requests
