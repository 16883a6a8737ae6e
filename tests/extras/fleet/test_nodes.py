"""How a node finds its address, and that nodes end together: without an engine."""

import os
import socket
import struct
from queue import SimpleQueue
from threading import Thread

import pytest

from qwen3next_plugin.config.errors import ConfigError
from qwen3next_plugin.extras.fleet import nodes
from qwen3next_plugin.extras.fleet.nodes import INTERFACE, end_together, meet_at

OWN = "TEST_OWN_ADDRESS"


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """What is set is unset after the test."""
    for name in (OWN, INTERFACE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class Group:
    """Of threads: the first one's objects come from a queue."""

    def __init__(self, rank: int, size: int, said: SimpleQueue) -> None:
        self.rank_in_group, self.world_size, self.said = rank, size, said

    def broadcast_object(self, said: object, src: int) -> object:
        if self.rank_in_group != src:
            return self.said.get()
        for _ in range(self.world_size - 1):
            self.said.put(said)
        return said


def test_the_address_is_the_one_that_reaches_the_first_node():
    meet_at("--master-addr", "127.0.0.1", OWN)
    assert (os.environ[OWN], os.environ[INTERFACE]) == ("127.0.0.1", "lo")


@pytest.mark.parametrize("given", [{OWN: "10.0.0.7"}, {INTERFACE: "eth7"}])
def test_what_is_given_is_kept(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    meet_at("--master-addr", "127.0.0.1", OWN)
    found = {OWN: os.environ[OWN], INTERFACE: os.environ[INTERFACE]}
    assert found == {OWN: "127.0.0.1", INTERFACE: "lo"} | given


def test_a_name_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"--master-addr nowhere\.invalid: this node has no way"):
        meet_at("--master-addr", "nowhere.invalid", OWN)


def test_a_name_that_is_a_loopback_address(monkeypatch):
    """As Debian's /etc/hosts has this machine's: other nodes would connect to themselves."""
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ConfigError, match=r"--master-addr node1: .* loopback .* give the address"):
        meet_at("--master-addr", "node1", OWN)
    meet_at("--master-addr", "localhost", OWN)
    assert os.environ[INTERFACE] == "lo"


def test_strangers_do_not_count(monkeypatch):
    """Whoever connects without the word is no node, and may leave, reset or say nothing."""
    monkeypatch.setattr(nodes, "WORD_SECONDS", 0.1)
    said, lost = SimpleQueue(), SimpleQueue()
    options = {"ranks_here": 1, "first_node": True, "own": "127.0.0.1", "lost": lost.put}
    first = Thread(target=end_together, args=(Group(0, 2, said),), kwargs=options)
    first.start()
    where, word = said.get()
    with socket.create_connection(where) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_connection(where) as stranger:
        at_once = struct.pack("ii", 1, 0)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    with socket.create_connection(where), socket.create_connection(where) as node:
        node.sendall(word)
        first.join()
        assert lost.empty()
    assert "the node at 127.0.0.1 has ended" in lost.get(timeout=600)
