"""What clients ask of a server of the shipped checkpoint, whichever engine it is."""

import asyncio
import json
from collections.abc import Callable, Sequence

import openai
from openai.types.chat import ChatCompletion

from commands import of
from engines.server import Server
from patience import ticks

PROMPTS = [
    "import os\n",
    "def add(a, b):\n    return ",
    "class Reader:\n    def __init__(self, path):\n",
    "for i in range(10):\n    print(",
    "if __name__ == '__main__':\n",
    '"""Read a file and return its lines."""\n',
    "x = [1, 2, 3]\nfor value in x:\n",
    "try:\n    value = int(text)\nexcept ",
]
TOKENS = 48
Messages = list[dict[str, str]]


def eventually(happened: Callable[[], object]) -> bool:
    """Whether it happens in time; asks again and again."""
    return any(happened() for _ in ticks())


def check_readmes_question(server: Server) -> None:
    """What README's curl sends gets an answer; to this server, and of its model."""
    (command,) = of("curl")
    url, body = command.arguments[0], command.arguments[-1]
    question = json.loads(body) | {"model": server.model}
    answer = server.post(url.removeprefix("http://localhost:8000"), **question)
    assert "directory" in answer["choices"][0]["message"]["content"]


def complete(server: Server, prompt: str, tokens: int = TOKENS, **options) -> str:
    """A greedy continuation."""
    answer = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=tokens, temperature=0, **options
    )
    return answer.choices[0].text


def streamed(server: Server, prompt: str) -> str:
    """The same, chunk by chunk."""
    stream = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert chunks[-1].finish_reason in ("length", "stop")
    return "".join(choice.text for choice in chunks)


def at_once(server: Server, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations, each asked for by a client of its own, all at the same time."""

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await client.completions.create(
            model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0
        )
        return answer.choices[0].text

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(**server.openai_options()) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    return asyncio.run(everybody())


def hang_up(server: Server, prompt: str) -> None:
    """Ask for a long answer and go away after its first chunk."""
    stream = server.client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=2000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()


def chat(server: Server, messages: Messages, tokens: int = 24, **options) -> ChatCompletion:
    """A greedy answer in a chat."""
    return server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=tokens, temperature=0, **options
    )


def streamed_chat(server: Server, messages: Messages) -> str:
    """The same, chunk by chunk."""
    stream = chat(server, messages, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def next_turn(messages: Messages, answer: ChatCompletion, question: str) -> Messages:
    """The chat as it goes on."""
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    return [*messages, said, {"role": "user", "content": question}]


def usage_by_limit(server: Server, prompt: str, limits: Sequence[int]) -> list[int]:
    """How many tokens an answer has that may have so many."""
    return [
        server.client.completions.create(
            model=server.model, prompt=prompt, max_tokens=limit, temperature=0
        ).usage.completion_tokens
        for limit in limits
    ]
