"""A server of two nodes, each on a host of its own: two network namespaces."""

import json

import pytest

from checkpoints import SHIPPED
from engines.checks import check_greedy
from engines.process import CPUS, Fork, Process
from engines.vllm.offline import preload
from engines.vllm.server import Server, greedy, serve
from extras.fleet.hosts import (
    LOST,
    PORT,
    TOKENS,
    Host,
    check_drafts,
    check_they_end,
    on,
    prompts,
    served,
)
from needs import needs

pytestmark = [
    pytest.mark.serve,
    needs("two-cores"),
]

FLAGS = (
    "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager",
    "--tensor-parallel-size", "2", "--nnodes", "2", "--master-port", PORT,
    "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 3}),
)  # fmt: skip


class Node(Server):
    """One of them, with one core: all of its processes are forks."""

    def __init__(self, hosts: list[Host], rank: int) -> None:
        self.where = hosts[rank]
        own = ("--master-addr", hosts[0].address, "--node-rank", str(rank))
        headless = ("--headless",) if rank else ()
        env = {"VLLM_CPU_OMP_THREADS_BIND": str(CPUS[rank])}
        super().__init__(SHIPPED, *FLAGS, *own, *headless, env=env)

    def start(self, env: dict[str, str], *flags: str) -> Process:
        preload()
        return Fork(on, self.where, serve, *self.command(*flags), env=env)


@pytest.mark.parametrize("lost", LOST)
def test_two_hosts_answer_as_one_and_end_together(reference, lost):
    with served(Node) as nodes:
        answers = [greedy(nodes[0], prompt, TOKENS) for prompt in prompts()]
        check_drafts(nodes[0], "vllm")
        check_they_end(nodes, lost)
    check_greedy(reference(SHIPPED), prompts(), answers)
