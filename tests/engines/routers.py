"""SGLang's router before two servers: a conversation stays where its earlier turns are cached."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from json import load

import openai

from engines.clients import Messages, eventually
from engines.dialogues import ROOT
from engines.process import Process, free_port
from engines.server import TIMEOUT_S, Server

PYTHON = ROOT / ".router" / "bin" / "python"
AT_ONCE = 4
TOKENS = 24
UNIT = 32  # tokens: a hit ends at a multiple of them, one earlier with MTP


@contextmanager
def routed(servers: Sequence[Server], *how: str) -> Iterator[openai.OpenAI]:
    """A client of both, through a router that has found them.

    Args: how: the router's flags that name them, by default as servers of which any one answers.
    """
    port = str(free_port())
    where = ("--host", "127.0.0.1", "--port", port, "--prometheus-port", str(free_port()))
    how = how or ("--worker-urls", *(server.address for server in servers))
    command = [str(PYTHON), "-m", "sglang_router.launch_router", *where, "--policy", "cache_aware"]
    process = Process([*command, *how], dict(os.environ))
    address = f"http://127.0.0.1:{port}"

    def found() -> bool:
        try:
            with urllib.request.urlopen(f"{address}/workers", timeout=60) as answer:
                return load(answer)["total"] == len(servers)
        except (urllib.error.URLError, OSError):
            return False

    try:
        assert eventually(found), process.text()[-4000:]
        options = {"api_key": "none", "max_retries": 0, "timeout": TIMEOUT_S}
        with openai.OpenAI(base_url=f"{address}/v1", **options) as client:
            yield client
    finally:
        process.stop()


def check_conversations(servers: Sequence[Server], requests: str) -> None:
    """Args: requests: the metric that counts those of a server."""
    model, talks = servers[0].model, []

    def both_are_asked() -> bool:
        more = [opening(len(talks) + i) for i in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as clients:
            list(clients.map(lambda talk: turn(client, model, talk), more))
        talks.extend(more)
        return all(server.metrics().get(requests, 0) for server in servers)

    with routed(servers) as client:
        assert eventually(both_are_asked)
        for talk in talks:
            read, _ = turn(client, model, talk)
            _, cached = turn(client, model, talk)
            assert cached > read - 2 * UNIT, talk


def opening(number: int) -> Messages:
    """Of a conversation like no other."""
    return [{"role": "user", "content": f"{number} is my number. " + f"value_{number} " * 80}]


def turn(client: openai.OpenAI, model: str, talk: Messages) -> tuple[int, int]:
    """Ask, and note the answer and the next question; the prompt's tokens, and those cached."""
    answer = client.chat.completions.create(
        model=model, messages=talk, max_tokens=TOKENS, temperature=0
    )
    talk.append({"role": "assistant", "content": answer.choices[0].message.content})
    talk.append({"role": "user", "content": "And then?"})
    details = answer.usage.prompt_tokens_details
    return answer.usage.prompt_tokens, (details and details.cached_tokens) or 0
