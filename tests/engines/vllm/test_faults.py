"""Faults of the machine: the server serves, or ends with one line that names the fault."""

import os
import signal
import socket
from pathlib import Path

import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete
from engines.faults import (
    TOO_LARGE,
    TOO_LITTLE,
    cgroup,
    check_cut_off,
    check_ends,
    check_ends_without_memory,
    inside,
    where,
    without_caches,
)
from engines.vllm.server import Server
from needs import needs

pytestmark = pytest.mark.serve

FLAGS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4")
DRAFTS = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}')
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


class Hindered(Server):
    """A server that finds a folder in one of STATES."""

    def __init__(self, folder: Path, state: str, *flags: str, **options: dict[str, str]) -> None:
        self.hindrance = str(folder), state
        super().__init__(SHIPPED, *FLAGS, *DRAFTS, *flags, **options)

    def command(self, *flags: str) -> list[str]:
        return where(*self.hindrance, super().command(*flags))

    def environment(self) -> dict[str, str]:
        return without_caches(super().environment())


class Confined(Server):
    """A server in a cgroup."""

    def __init__(self, made: Path, model: Path, *flags: str) -> None:
        self.cgroup = made
        super().__init__(model, *flags)

    def command(self, *flags: str) -> list[str]:
        return inside(self.cgroup, super().command(*flags))


@needs("mounts")
@pytest.mark.long  # a checkout below /tmp would be hidden, too
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_it_serves_without_a_tmp_to_write_to(state):
    """And Ctrl-C ends it as a terminal sends it: to all of its processes."""
    server = Hindered(Path("/tmp"), state, "--enforce-eager").wait()
    try:
        assert complete(server, PROMPTS[0])
        with server.ends_cleanly():
            os.killpg(server.process.child.pid, signal.SIGINT)
    finally:
        server.close()


def answers() -> None:
    server = Server(SHIPPED, *FLAGS, *DRAFTS).wait()
    try:
        assert complete(server, PROMPTS[0])
    finally:
        server.close()


@pytest.mark.long
@needs("mounts")
def test_it_serves_offline_with_a_read_only_home(tmp_path):
    """Compiled, as `make serve` does."""
    check_cut_off(tmp_path, "engines.vllm.test_faults")


@pytest.mark.long
@needs("mounts")
def test_no_room_for_compiled_graphs(tmp_path):
    env = dict.fromkeys(CACHES, str(tmp_path))
    check_ends(Hindered(tmp_path, "full", env=env), "No space left on device")


@pytest.mark.long
def test_weights_that_memory_cannot_hold():
    with cgroup() as made:
        check_ends(Confined(made, *TOO_LARGE, "--language-model-only"), TOO_LITTLE)


@pytest.mark.long
def test_memory_that_runs_out_while_it_serves():
    flags = ("--max-model-len", "8192", "--max-num-seqs", "4", "--enforce-eager")
    check_ends_without_memory(Server(SHIPPED, *flags, *DRAFTS).wait())


@pytest.mark.long
def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        check_ends(Server(SHIPPED, *FLAGS, "--port", port), "Address already in use")


@pytest.mark.long
def test_two_servers_at_once():
    """They start at the same time, answer the same, and count their own tokens only."""
    servers = [Server(SHIPPED, *FLAGS, *DRAFTS, "--enforce-eager") for _ in range(2)]
    try:
        one, other = (server.wait() for server in servers)
        assert complete(one, PROMPTS[0]) == complete(other, PROMPTS[0])
        complete(other, PROMPTS[1])
        name = "vllm:generation_tokens_total"
        assert 2 * one.metrics()[name] == other.metrics()[name] > 0
    finally:
        for server in servers:
            server.close()
