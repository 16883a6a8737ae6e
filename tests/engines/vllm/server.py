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
    """The same, and its processes, forked from one that has vLLM loaded."""

    def start(self, env: dict[str, str], *flags: str) -> Process:
        preload()
        return Fork(serve, *self.command(*flags), env=env)


def serve(*command: str) -> None:
    """What the script `vllm` does."""
    from vllm.entrypoints.cli.main import main

    sys.argv[:] = command
    main()
