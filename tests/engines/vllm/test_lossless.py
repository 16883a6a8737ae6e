"""Speculation changes no token: off, every draft length, and adaptive, under load."""

import json
from collections.abc import Sequence
from functools import cache

import pytest

from checkpoints import SHIPPED
from engines.vllm.server import Server
from engines.vllm.traffic import Request, requests, send

pytestmark = pytest.mark.serve

CLIENTS, LOADED, ALONE = 16, 210, 12
# fp32: no token hangs on a rounding. Prompts in chunks, and memory for about half the clients.
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "60",
)  # fmt: skip
CASES = {"k=1": (1, "fixed"), "k=2": (2, "fixed"), "k=3": (3, "fixed"), "k=4": (4, "fixed")}
CASES["adaptive"] = (4, "adaptive")


def answers(*flags: str, env: dict[str, str] | None = None) -> list[tuple[int, ...] | None]:
    """What the requests of this test get: the first few alone, then all at once."""
    batch = traffic()
    server = Server(SHIPPED, *FLAGS, *flags, env=env).wait()
    try:
        found = send(server, batch[:ALONE], 1) + send(server, batch, CLIENTS)
        metrics = server.metrics()
    finally:
        server.close()
    # else the test would not see what it is for
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    if flags:
        assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
    return found


@cache
def traffic() -> Sequence[Request]:
    return requests(LOADED + 40, seed=8, abort_share=0.15)


@cache
def without_drafts() -> list[tuple[int, ...] | None]:
    return answers()


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_as_without_drafts(case):
    k, schedule = CASES[case]
    drafts = json.dumps({"method": "mtp", "num_speculative_tokens": k})
    found = answers("--speculative-config", drafts, env={"QWEN3NEXT_DRAFTS": schedule})
    expected = without_drafts()
    assert sum(answer is not None for answer in expected) >= 200
    assert found == expected
