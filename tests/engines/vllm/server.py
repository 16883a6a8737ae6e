"""`vllm serve` in a process group of its own, on a free port."""

import sys
from pathlib import Path

from engines import server
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

    def start(self, env: dict[str, str], *flags: str) -> Process:
        preload()
        return Fork(serve, *self.command(*flags), env=env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def serve(*command: str) -> None:
    """What the script `vllm` does."""
    import torch
    from vllm.entrypoints.cli.main import main

    if "--enforce-eager" in command:
        torch.compiler.set_stance("force_eager")  # see loaded.py
    sys.argv[:] = command
    main()
