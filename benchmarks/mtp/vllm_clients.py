"""`vllm serve` on the shipped checkpoint: tokens per second by clients and draft policy."""

import itertools
import json
import os
from collections.abc import Iterator
from functools import partial

from benchmarks.block_model import TINY
from benchmarks.mtp.clients import ADAPTIVE, OFF, compare, running
from benchmarks.report import Record, Run
from benchmarks.server import Server

MAX_DRAFT = 4
FIXED = {f"k = {k}": (k, "fixed") for k in range(1, MAX_DRAFT + 1)}
POLICIES = {OFF: (0, "fixed"), **FIXED, ADAPTIVE: (MAX_DRAFT, "adaptive")}
LONGEST = f"k = {MAX_DRAFT}"
QUICK = (OFF, LONGEST)
MEMORY = 1 << 29  # of each server's KV cache
CASE = "vllm serve, the shipped checkpoint, bf16, eager, greedy, prompts of Python source"


def measure(run: Run) -> Iterator[Record]:
    """All policies, or two of them in a quick run; then what the servers counted."""
    policies = QUICK if run.quick else tuple(POLICIES)
    with running(partial(server, run), policies, together=run.quick) as servers:
        yield from compare(run, "mtp/clients", CASE, servers)
        yield run.record(
            "mtp/acceptance",
            "How many drafts are accepted at each position, given those before it?",
            f"{CASE}, {LONGEST}",
            {str(position): "" for position in range(1, MAX_DRAFT + 1)},
            {"share accepted": acceptance(servers[LONGEST])},
        )
        if ADAPTIVE in servers:
            yield run.record(
                "mtp/draft_length",
                "How long are adaptive drafts?",
                f"{CASE}, adaptive, k = {MAX_DRAFT}",
                {"mean": "tokens"},
                {"draft length": {"mean": mean_draft_length(servers[ADAPTIVE])}},
            )


def server(run: Run, policy: str) -> Server:
    """A server that drafts by this policy."""
    k, drafts = POLICIES[policy]
    speculation = {"method": "mtp", "num_speculative_tokens": k}
    flags = ["--kv-cache-memory-bytes", str(MEMORY)]
    flags += ["--speculative-config", json.dumps(speculation)] if k else []
    env = os.environ | {"QWEN3NEXT_DRAFTS": drafts, "OMP_WAIT_POLICY": "passive"}
    return Server(TINY, run.out / f"clients-{policy.replace(' ', '')}.log", env, *flags)


def acceptance(server: Server) -> dict[str, float]:
    """Share of the drafts made at each position that were accepted, given those before."""
    accepted = server.samples("vllm:spec_decode_num_accepted_tokens_per_pos_total")
    drafts = sum(server.samples("vllm:spec_decode_num_drafts_total"))
    return {
        str(position): here / before
        for position, (before, here) in enumerate(itertools.pairwise([drafts, *accepted]), 1)
    }


def mean_draft_length(server: Server) -> float:
    """Of all requests so far, in tokens."""
    total, count = (
        sum(server.samples(f"vllm:qwen3next_draft_length_{part}")) for part in ("sum", "count")
    )
    return total / count
