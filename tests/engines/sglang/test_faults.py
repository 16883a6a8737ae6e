"""Faults of the machine: the server serves, or ends with one line that names the fault."""

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
from engines.sglang.server import NEXTN, Server
from needs import needs

pytestmark = pytest.mark.serve

FLAGS = (*NEXTN, "3", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics")


class Hindered(Server):
    """A server that finds /tmp in one of STATES."""

    def __init__(self, state: str) -> None:
        self.state = state
        super().__init__(SHIPPED, *FLAGS)

    def command(self, *flags: str) -> list[str]:
        return where("/tmp", self.state, super().command(*flags))

    def environment(self) -> dict[str, str]:
        return without_caches(super().environment())


class Confined(Server):
    """A server in a cgroup."""

    def __init__(self, made: Path, model: Path, *flags: str) -> None:
        self.cgroup = made
        super().__init__(model, *flags)

    def command(self, *flags: str) -> list[str]:
        return inside(self.cgroup, super().command(*flags))


@pytest.mark.long
@needs("mounts")
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_it_serves_without_a_tmp_to_write_to(state):
    server = Hindered(state).wait()
    try:
        assert complete(server, PROMPTS[0])
    finally:
        server.close()


def answers() -> None:
    server = Server(SHIPPED, *FLAGS).wait()
    try:
        assert complete(server, PROMPTS[0])
    finally:
        server.close()


@pytest.mark.long
@needs("mounts")
def test_it_serves_offline_with_a_read_only_home(tmp_path):
    check_cut_off(tmp_path, "engines.sglang.test_faults")


@pytest.mark.long
def test_two_servers_at_once():
    servers = [Server(SHIPPED, *FLAGS) for _ in range(2)]
    try:
        one, other = (server.wait() for server in servers)
        assert complete(one, PROMPTS[0]) == complete(other, PROMPTS[0])
    finally:
        for server in servers:
            server.close()


@pytest.mark.long
def test_weights_that_memory_cannot_hold():
    with cgroup() as made:
        check_ends(Confined(made, *TOO_LARGE), TOO_LITTLE)


@pytest.mark.long
def test_memory_that_runs_out_while_it_serves():
    flags = ("--max-total-tokens", "16384", "--context-length", "8192")
    check_ends_without_memory(Server(SHIPPED, *NEXTN, "3", *flags).wait())


@pytest.mark.long
@needs("mounts")
def test_no_room_for_metrics():
    check_ends(Hindered("nearly full"), "--enable-metrics: /tmp has 256 KiB left")


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        says = f"--port {port}: the server cannot listen on 127.0.0.1 (Address already in use)"
        check_ends(Server(SHIPPED, *FLAGS, "--port", port), says)
