"""SGLang's server on the shipped checkpoint: tokens per second by clients, NEXTN on and off."""

import os
from collections.abc import Iterator
from functools import partial

from benchmarks.block_model import TINY
from benchmarks.mtp.clients import ADAPTIVE, OFF, compare, running
from benchmarks.report import Record, Run
from benchmarks.server import SGLangServer

NEXTN = ("--speculative-algo", "NEXTN", "--speculative-num-steps", "3")
POLICIES: dict[str, tuple[str, ...]] = {OFF: (), ADAPTIVE: NEXTN}
CASE = "SGLang, the shipped checkpoint, bf16, greedy, prompts of Python source, NEXTN"


def measure(run: Run) -> Iterator[Record]:
    """Both policies."""
    with running(partial(server, run), tuple(POLICIES), together=run.quick) as servers:
        yield from compare(run, "mtp/sglang_clients", CASE, servers)


def server(run: Run, policy: str) -> SGLangServer:
    """A server that drafts by this policy."""
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}
    log = run.out / f"sglang-clients-{policy}.log"
    return SGLangServer(TINY, log, env, *POLICIES[policy])
