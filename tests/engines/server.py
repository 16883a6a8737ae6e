"""A real server of either engine, and a real client of it."""

import json
import re
import signal
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil

from engines.process import START_SECONDS, Process, free_port
from patience import ticks

TIMEOUT_S = 600  # of a request, the connection included
# Seconds that a server leaves an idle connection open, as long as any test lasts: a client that
# takes one up just as the server closes it would get no answer.
KEEP_ALIVE = dict.fromkeys(("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "SGLANG_TIMEOUT_KEEP_ALIVE"), "3600")


class Server(ABC):
    """A server of `model` in a process of its own, on a free port; `client` is a client of it."""

    HEALTH: str  # the path that answers as soon as requests are served
    END = signal.SIGTERM  # what it is stopped with

    def __init__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.host, self.port, self.folder = "127.0.0.1", free_port(), model
        self.model = str(model)
        self.address = f"http://{self.host}:{self.port}"
        self.began = time.monotonic()
        self.process = self.start(self.environment() | KEEP_ALIVE | (env or {}), *flags)
        self.client = openai.OpenAI(**self.openai_options())

    def openai_options(self) -> dict[str, Any]:
        """What a client of the server is made with. It waits as long as a busy machine needs."""
        url = f"{self.address}/v1"
        return {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": TIMEOUT_S}

    def start(self, env: dict[str, str], *flags: str) -> Process:
        """The process of the server."""
        return Process(self.command(*flags), env)

    @abstractmethod
    def command(self, *flags: str) -> list[str]:
        """What a user would type."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What the process finds in its environment."""

    def wait(self, seconds: float = START_SECONDS) -> "Server":
        """Return when it is healthy; raise with its log when it ends or takes too long."""
        for _ in ticks(seconds):
            if self.process.code() is not None or self.healthy():
                break
        if not self.healthy():
            log = self.process.text()
            self.close()
            raise AssertionError(f"no server:\n{log[-8000:]}")
        self.start_seconds = time.monotonic() - self.began
        return self

    def refusal(self) -> str:
        """The log of a server that ends by itself, in failure."""
        try:
            self.process.wait(START_SECONDS)
            assert self.process.code(), "it goes on, or ended well"
            return self.process.text()
        finally:
            self.close()

    def get(self, path: str, timeout: float = TIMEOUT_S) -> str:
        with urllib.request.urlopen(self.address + path, timeout=timeout) as answer:
            return answer.read().decode()

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)

    def healthy(self) -> bool:
        try:
            self.get(self.HEALTH, timeout=60)
        except (urllib.error.URLError, OSError):
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by name, summed over labels."""
        sums: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            if line and not line.startswith("#"):
                sample, value = line.rsplit(" ", 1)
                name = sample.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def by_label(self, sample: str, label: str) -> dict[str, float]:
        """The values of one Prometheus sample by one label of it."""
        return {
            re.search(rf'\b{label}="([^"]*)"', line)[1]: float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").splitlines()
            if line.startswith(f"{sample}{{")
        }

    def huge_bytes(self) -> int:
        """Memory of all its processes that is in huge pages."""
        found = (Path(f"/proc/{each.pid}/smaps_rollup").read_text() for each in self.processes())
        return sum(int(re.search(r"AnonHugePages:\s*(\d+) kB", text)[1]) << 10 for text in found)

    def cpu_seconds(self) -> dict[int, float]:
        """What each of its processes has computed, by process id."""
        return {each.pid: sum(each.cpu_times()[:2]) for each in self.processes()}

    def processes(self) -> list[psutil.Process]:
        """The first one, and those that it started."""
        first = psutil.Process(self.process.child.pid)
        return [first, *first.children(recursive=True)]

    def shared_memory(self) -> set[str]:
        """The files in /dev/shm that its processes have mapped."""
        maps = (Path(f"/proc/{each.pid}/maps").read_text() for each in self.processes())
        return {file for text in maps for file in re.findall(r" (/dev/shm/\S+)\n", text)}

    @contextmanager
    def ends_cleanly(self, code: int = 0) -> Iterator[None]:
        """What this block does ends its processes well: nothing is left, and no error is said."""
        processes, files, before = self.processes(), self.shared_memory(), len(self.process.text())
        yield
        self.process.wait(START_SECONDS)
        left = psutil.wait_procs(processes, 20)[1]
        # If the engine ends before the streams do, vLLM's server says that it is gone.
        lines = self.process.text()[before:].splitlines()
        said = "\n".join(line for line in lines if "async_llm.py" not in line)
        assert self.process.code() == code, said
        assert not left
        assert not [file for file in files if Path(file).exists()]
        assert not re.search("Traceback|leaked|killing", said), said

    def close(self) -> None:
        self.client.close()
        self.process.stop(self.END)


@contextmanager
def closing(*servers: Any) -> Iterator[list[Any]]:
    """All, ready; stopped in the end."""
    try:
        yield [each.wait() for each in servers]
    finally:
        for each in servers:
            each.close()


def most_cores(servers: Sequence[Server], seconds: float = 3) -> float:
    """The cores that the busiest of these servers computes with, for so long."""
    before, began = [sum(each.cpu_seconds().values()) for each in servers], time.monotonic()
    time.sleep(seconds)
    spent = [sum(each.cpu_seconds().values()) - t for each, t in zip(servers, before, strict=True)]
    return max(spent) / (time.monotonic() - began)
