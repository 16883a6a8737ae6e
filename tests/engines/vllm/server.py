"""`vllm serve` in a process group of its own, on a free port."""

import sys
from pathlib import Path

from engines import server
from engines.vllm.offline import environment

VLLM = str(Path(sys.executable).with_name("vllm"))


class Server(server.Server):
    """A real vLLM server."""

    HEALTH = "/health"

    def command(self, *flags: str) -> list[str]:
        where = ("--host", self.host, "--port", str(self.port))
        return [VLLM, "serve", self.model, *where, *flags]

    def environment(self) -> dict[str, str]:
        return environment()
