"""Two hosts on this machine: namespaces with a cable between them, and a server on both."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.checks import Prompts
from engines.clients import PROMPTS, complete, eventually
from engines.process import START_SECONDS
from engines.server import Server
from needs import PATH, need
from patience import ticks

NETWORK, MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET, CLONE_NEWNS
PORT = "29500"  # where ranks meet, on the first host
TOKENS = 20
LOST = [  # a node, or the cable
    pytest.param(1, id="second"),
    pytest.param(0, id="first", marks=pytest.mark.long),
    pytest.param(None, id="cable", marks=pytest.mark.long),
]


@dataclass(frozen=True)
class Host:
    """A network of its own: its loopback, and an address on the cable."""

    name: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread opens, opens there."""
        with open("/proc/thread-self/ns/net") as before:
            self.enter()
            try:
                yield
            finally:
                _libc("setns", before.fileno(), NETWORK)

    def enter(self) -> None:
        """This thread, and what it starts, stays there."""
        with open(f"/run/netns/{self.name}") as file:
            _libc("setns", file.fileno(), NETWORK)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    need("ip")
    need("root")
    hosts = [Host(f"q3n-{os.getpid()}-{rank}", f"10.77.0.{rank + 1}") for rank in range(2)]
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name).check_returncode()
            made.append(host)
        _connect(*hosts)
        yield hosts
    finally:
        for host in made:
            _ip("netns", "del", host.name)


def _connect(one: Host, other: Host) -> None:
    """A cable from one to the other. Each has another name for its end, as machines may."""
    ends = {one: "left0", other: "right0"}
    cable = ("type", "veth", "peer", "name", ends[other], "netns", other.name)
    commands = [("link", "add", ends[one], "netns", one.name, *cable)]
    for host, end in ends.items():
        there = ("-n", host.name)
        commands += [
            (*there, "addr", "add", f"{host.address}/24", "dev", end),
            (*there, "link", "set", end, "up"),
            (*there, "link", "set", "lo", "up"),
        ]
    for command in commands:
        done = _ip(*command)
        assert done.returncode == 0, done.stderr


@contextmanager
def served(node: Callable[[list[Host], int], Server]) -> Iterator[list[Server]]:
    """A server of two nodes, asked where the first one is."""
    with two_hosts() as hosts:
        nodes = [node(hosts, rank) for rank in range(2)]
        try:
            with hosts[0].entered():
                _wait(nodes)
                yield nodes
        finally:
            for one in nodes:
                one.close()


def _wait(nodes: list[Server]) -> None:
    """Return when the first node is healthy; raise with both logs when one ends before."""
    for _ in ticks(START_SECONDS):
        if nodes[0].healthy():
            return
        if any(one.process.code() is not None for one in nodes):
            break
    raise AssertionError("\n".join(one.process.text()[-6000:] for one in nodes))


def prompts() -> Prompts:
    """As token ids."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    return [tuple(tokenizer.encode(text).ids) for text in PROMPTS[1:3]]


def check_drafts(server: Server, engine: str) -> None:
    """The first node decides, by what steps cost, and shows it."""
    name = f"{engine}:qwen3next_"

    def drafted() -> bool:
        complete(server, PROMPTS[0], extra_body={"ignore_eos": True})
        return server.metrics()[f"{name}draft_length_sum"] > 0

    assert eventually(drafted)
    costs = server.by_label(f"{name}expected_step_seconds", "drafts")
    assert list(costs) == ["0", "1", "2", "3"]
    assert min(costs.values()) > 0


def check_they_end(nodes: list[Server], lost: int | None) -> None:
    """A node is killed while none computes, or cut off: the other ends, and says which it was."""
    if lost is None:
        assert _ip("-n", nodes[1].where.name, "link", "set", "right0", "down").returncode == 0
    else:
        os.killpg(nodes[lost].process.child.pid, signal.SIGKILL)
    for rank, node in enumerate(nodes):
        if rank != lost:
            assert eventually(lambda node=node: node.process.code() is not None)
            text = node.process.text()
            assert node.process.code(), text[-4000:]
            assert f"the node at 10.77.0.{2 - rank} has ended or is cut off" in text


def on(host: Host, target: Callable[..., None], *arguments: Any) -> None:
    """Call it there, in a fork. What ranks of one machine share, it shares with nobody."""
    host.enter()
    _libc("unshare", MOUNTS)
    for mount in (("--make-rprivate", "/"), ("-t", "tmpfs", "none", "/dev/shm")):
        subprocess.run(["mount", *mount], check=True)
    target(*arguments)


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], env={"PATH": PATH}, capture_output=True, text=True)


def _libc(name: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        raise OSError(ctypes.get_errno(), name)
