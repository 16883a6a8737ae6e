"""Ray: workers on two hosts, which are network namespaces, and replicas behind Ray Serve."""

import json
import os
import subprocess
import sys

import pytest

from checkpoints import SHIPPED
from engines.checks import check_greedy
from engines.clients import eventually
from engines.dialogues import ROOT
from engines.process import CPUS, Fork, Process
from engines.routers import UNIT, opening, turn
from engines.vllm.server import Server, greedy
from extras.fleet.hosts import TOKENS, Host, check_drafts, on, prompts, served
from needs import needs

RAY = ROOT / ".ray"
pytestmark = [
    pytest.mark.serve,
    pytest.mark.long,
    needs("two-cores"),
    needs("ray"),
]

ALONE = {"RAY_AUTH_MODE": "disabled"}  # else a token in the home decides, on one node
START = (sys.executable, "-m", "ray.scripts.scripts", "start")
PORT = "6379"
NODE = (
    *("--block", "--num-cpus", "1", "--disable-usage-stats", "--object-store-memory", "100000000"),
)
FLAGS = (
    "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager",
    "--tensor-parallel-size", "2", "--distributed-executor-backend", "ray",
    "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 3}),
)  # fmt: skip


class Node(Server):
    """A node of Ray; on the first host, the server too, which knows nothing of the other."""

    def __init__(self, hosts: list[Host], rank: int) -> None:
        self.where, self.head = hosts[rank], f"{hosts[0].address}:{PORT}"
        self.rank = rank
        path = f"{RAY}:{os.environ.get('PYTHONPATH', '')}"
        env = ALONE | {"PYTHONPATH": path, "RAY_ADDRESS": self.head}
        super().__init__(SHIPPED, *FLAGS, env=env)

    def start(self, env: dict[str, str], *flags: str) -> Process:
        env.pop("VLLM_CPU_OMP_THREADS_BIND")  # the worker's own choice
        where = ("--node-ip-address", self.where.address)
        if self.rank:
            node = ("--address", self.head, *where, *NODE)
            return Fork(on, self.where, ray_node, *node, env=env)
        node = ("--head", "--port", PORT, "--include-dashboard=false", *where, *NODE)
        return Fork(on, self.where, ray_and_server, node, self.command(*flags), env=env)


def ray_node(*flags: str) -> None:
    """Be a node of Ray until it ends."""
    os.execv(START[0], [*START, *flags])


def ray_and_server(node: tuple[str, ...], command: list[str]) -> None:
    """Be the server, beside a node of Ray that shares this process's /dev/shm."""
    subprocess.Popen([*START, *node])
    os.execv(command[0], command)


def test_two_hosts_answer_as_one_and_end_together(reference):
    with served(Node) as nodes:
        answers = [greedy(nodes[0], prompt, TOKENS) for prompt in prompts()]
        check_drafts(nodes[0], "vllm")
        threads = f"rank 0 of 1 here has {len(CPUS)} threads"
        assert threads in nodes[0].process.text()
        for process in nodes[1].processes():
            process.kill()
        assert eventually(lambda: nodes[0].process.code() is not None)
        assert nodes[0].process.code()
    check_greedy(reference(SHIPPED), prompts(), answers)


class Replicas(Server):
    """The example: two engines behind Ray Serve."""

    HEALTH = "/v1/models"

    def command(self, *flags: str) -> list[str]:
        script = str(ROOT / "examples" / "ray_serve.py")
        return [sys.executable, script, self.model, "--port", str(self.port), *flags]


def test_ray_serve_sends_turns_to_the_replica_that_has_the_earlier_ones():
    server = Replicas(SHIPPED, env=ALONE | {"PYTHONPATH": str(RAY)})
    try:
        server.wait()
        talks = [opening(number) for number in range(4)]
        for talk in talks:
            read, _ = turn(server.client, server.model, talk)
            _, cached = turn(server.client, server.model, talk)
            assert cached > read - 2 * UNIT, talk
    finally:
        server.close()
