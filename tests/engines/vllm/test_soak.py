"""Thousands of requests, many of which hang up, in too little memory: nothing is left behind."""

import pytest

from checkpoints import SHIPPED
from engines.clients import eventually
from engines.traffic import BLOCKS, growing, requests, send
from engines.vllm.server import Forked

pytestmark = [pytest.mark.serve, pytest.mark.long]

AGAIN, CLIENTS = 16, 32
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "14",
    "--speculative-config", '{"method": "mtp", "num_speculative_tokens": 4}',
)  # fmt: skip


def idle(server: Forked) -> dict[str, float]:
    """The metrics of a server that has nothing left to do."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")

    def done() -> bool:
        metrics = server.metrics()
        return not any(metrics[name] for name in names)

    assert eventually(done)
    return server.metrics()


def test_thousands_of_requests_leave_no_trace():
    batch = requests(2000, seed=4, abort_share=0.3, tokens=16, longest=400)
    batch[20:20] = growing(12, BLOCKS[0])  # among those that are sent at once
    kept = [i for i, request in enumerate(batch) if request.hang_up is None]
    again = [batch[i] for i in kept[:AGAIN]]
    server = Forked(SHIPPED, *FLAGS, env={"QWEN3NEXT_DRAFTS": "adaptive"}).wait()
    try:
        before = send(server, again, 1)
        found = send(server, batch, CLIENTS)
        after = send(server, again, 1)
        metrics = idle(server)
    finally:
        server.close()
    assert 0.25 < 1 - len(kept) / len(batch) < 0.35
    assert [found[i] for i in kept[:AGAIN]] == before
    assert after == before
    assert all(found[i] is not None and len(found[i]) == batch[i].tokens for i in kept)
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    # else the test would not see what it is for
    assert metrics["vllm:num_preemptions_total"] > 10
    assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
