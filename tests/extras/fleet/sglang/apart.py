"""A server that reads prompts and one that decodes, and what SGLang's router asks of both."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from checkpoints import SHIPPED
from engines.bits import INVARIANT
from engines.process import free_port
from engines.sglang.server import FIXED, NEXTN, Answer, Forked, Server

DRAFTS = 3
CHUNK = 256  # tokens of a prompt that a step reads
FLAGS = (
    *("--dtype", "bfloat16", "--context-length", "2048", "--max-total-tokens", "8192"),
    *("--chunked-prefill-size", str(CHUNK)),
)
WITH_DRAFTS = (*NEXTN, str(DRAFTS))
ROOMS = count(1000, 1000)  # a request of many prompts has one more for each
Prompts = Sequence[tuple[int, ...]]


class Part(Forked):
    """One of both, on this machine's own address. Later flags and `env` win."""

    def __init__(
        self,
        mode: str,
        *flags: str,
        env: Mapping[str, str] = INVARIANT,
        model: Path = SHIPPED,
    ) -> None:
        self.bootstrap = free_port()  # where decode servers find a prefill server
        own = ("--disaggregation-mode", mode, "--disaggregation-transfer-backend", "nixl")
        if mode == "prefill":
            own = (*own, "--disaggregation-bootstrap-port", str(self.bootstrap))
        here = {"SGLANG_HOST_IP": "127.0.0.1", "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "30"}
        super().__init__(model, *FLAGS, *own, *flags, env=FIXED | here | dict(env))


def ask(server: Server, prompts: Prompts, tokens: int = 32, **fields: Any) -> list[dict[str, Any]]:
    """All prompts at once, greedily, with log-probabilities."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"sampling_params": params, "return_logprob": True} | fields
    return server.post("/generate", input_ids=[list(prompt) for prompt in prompts], **body)


def answers(found: Sequence[dict[str, Any]]) -> list[Answer]:
    return [Answer.of(each, return_logprob=True) for each in found]


def alone(server: Server, prompts: Prompts, tokens: int = 32, **fields: Any) -> list[Answer]:
    """What one server answers that has both parts."""
    return answers(ask(server, prompts, tokens, **fields))


def rooms(first: Part) -> dict[str, Any]:
    """The bootstrap fields of one request."""
    where = {"bootstrap_host": first.host, "bootstrap_port": first.bootstrap}
    return where | {"bootstrap_room": next(ROOMS)}


def apart(
    first: Part, second: Part, prompts: Prompts, tokens: int = 32, **fields: Any
) -> list[Answer]:
    """The second server's answers, of prompts that the first one reads."""
    fields |= rooms(first)
    with ThreadPoolExecutor(1) as other:
        read = other.submit(ask, first, prompts, tokens, **fields)
        found = ask(second, prompts, tokens, **fields)
        read.result()
    return answers(found)


def bits(found: Sequence[Answer]) -> list[Any]:
    """Of each answer its tokens, and their log-probabilities."""
    return [(answer.token_ids, answer.logprobs) for answer in found]
