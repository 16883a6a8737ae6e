"""`vllm serve` in a process group of its own, on a free port."""

import sys
from pathlib import Path

from engines import server
from engines.checks import Output
from engines.process import Fork, Process
from engines.vllm.offline import environment, preload

VLLM = str(Path(sys.executable).with_name("vllm"))


class Server(server.Server):
    """A real vLLM server."""

    HEALTH = "/health"

    def command(self, *flags: str) -> list[str]:
        where = ("--host", self.host, "--port", str(self.port))
        return [VLLM, "serve", self.model, *where, *flags]

    def environment(self) -> dict[str, str]:
        return environment()


class Forked(Server):
    """The same, forked from a process that has vLLM loaded, and so is its engine's process.

    That has the worker in it: one in another process, as Server's, takes time at every step.
    """

    WORKER_APART = "0"

    def start(self, env: dict[str, str], *flags: str) -> Process:
        preload()
        apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": self.WORKER_APART}
        return Fork(serve, *self.command(*flags), env=env | apart)


class ForkedTwice(Forked):
    """The same with the worker in a process of its own, as Server has it: another fork."""

    WORKER_APART = "1"


def greedy(server: Server, prompt: tuple[int, ...], tokens: int) -> Output:
    """Its greedy continuation of token ids."""
    (choice,) = server.client.completions.create(
        model=server.model,
        prompt=list(prompt),
        max_tokens=tokens,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).choices
    return Output(
        token_ids=tuple(choice.token_ids),
        logprobs=tuple(choice.logprobs.token_logprobs),
        prompt_logprobs=None,
        cached=0,
        finish_reason=choice.finish_reason,
        text=choice.text,
    )


def serve(*command: str) -> None:
    """What the script `vllm` does."""
    import torch
    from vllm.entrypoints.cli.main import main

    if "--enforce-eager" in command:
        torch.compiler.set_stance("force_eager")  # see loaded.py
    sys.argv[:] = command
    main()
