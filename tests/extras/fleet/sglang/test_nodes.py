"""A server of two nodes, each on a host of its own: two network namespaces."""

import pytest

from checkpoints import SHIPPED
from engines.checks import check_greedy
from engines.process import Fork, Process
from engines.sglang import launch
from engines.sglang.server import NEXTN, Server
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
    *("--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics"),
    *("--skip-server-warmup", "--tp-size", "2", "--nnodes", "2", *NEXTN, "3"),
)


class Node(Server):
    """One of them: all of its processes are forks."""

    def __init__(self, hosts: list[Host], rank: int) -> None:
        self.where = hosts[rank]
        own = ("--dist-init-addr", f"{hosts[0].address}:{PORT}", "--node-rank", str(rank))
        super().__init__(SHIPPED, *FLAGS, *own)

    def start(self, env: dict[str, str], *flags: str) -> Process:
        Fork.preload(["engines.sglang.loaded"], self.environment())
        return Fork(on, self.where, launch.forked, *self.arguments(*flags), env=env)


@pytest.mark.parametrize("lost", LOST)
def test_two_hosts_answer_as_one_and_end_together(reference, lost):
    with served(Node) as nodes:
        options = {"return_logprob": True, "logprob_start_len": 0}
        answers = nodes[0].greedy(prompts(), TOKENS, **options)
        check_drafts(nodes[0], "sglang")
        check_they_end(nodes, lost)
    check_greedy(reference(SHIPPED), prompts(), answers)
