"""While an attack lives, a neighbour's stream goes on: the same tests for either engine.

Each environment has one engine, whose server is started once, with drafts.
"""

import importlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import httpx
import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete
from engines.hostile import ask, fields
from engines.server import Server

pytestmark = pytest.mark.serve

ENGINE = "vllm" if find_spec("vllm") else "sglang"
# Between two pieces of a neighbour's stream, and before its first.
SILENCE_S = 1.0
STARTS = {
    "vllm": (
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
        *("--max-num-seqs", "32"),
        *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'),
    ),
    "sglang": (
        *("--dtype", "float32", "--max-total-tokens", "32768"),
        *("--speculative-algo", "NEXTN", "--speculative-num-steps", "3"),
    ),
}


@dataclass(frozen=True)
class Attack:
    """What one client asks beside an honest completion, and what it is answered."""

    body: dict[str, Any]
    status: int = 400
    says: str = ""
    path: str = "/v1/completions"
    engines: tuple[str, ...] = ("vllm", "sglang")
    clients: int = 1  # that ask it at once
    more: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 200})


ATTACKS: dict[str, Attack] = {
    "more log-probabilities than memory has room for": Attack(
        {"logprobs": 20, "max_tokens": 3000, "n": 128}, says="asks for 8064000 log-probabilities"
    ),
    "stop strings without end": Attack({"stop": ["zebra"] * 100_000}, says="stop"),
    "weights for an unknown group": Attack(
        {"master_address": "127.0.0.1", "ports": "1", "group_name": "nope"},
        path="/send_weights_to_remote_instance",
        says="nope_1_0",
        engines=("sglang",),
    ),
    "a profile that cannot begin": Attack(
        {"activities": ["MEM"]},
        path="/start_profile",
        says="_cuda_record_memory_history",
        engines=("sglang",),
    ),
    "a sleep beyond time": Attack(
        {"forward_sleep_time": 1e300},
        path="/slow_down",
        says="forward_sleep_time",
        engines=("sglang",),
    ),
    "a regex that backtracks": Attack(
        {"stop_regex": r"([\s\S]+)+\x00"}, says="stop_regex", engines=("sglang",)
    ),
}
HERE = [name for name, attack in ATTACKS.items() if ENGINE in attack.engines]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    forked = importlib.import_module(f"engines.{ENGINE}.server").Forked
    server = forked(SHIPPED, *STARTS[ENGINE]).wait()
    complete(server, PROMPTS[0])
    yield server
    server.close()


def silence(server: Server, attacks: list[Future]) -> float:
    """The longest wait of a client that streams one answer after another while attacks live."""
    body = fields(server, max_tokens=1000, stream=True, ignore_eos=True)
    longest, last, done = 0.0, time.monotonic(), False
    with httpx.Client(timeout=300) as http:
        while not done:
            with http.stream("POST", f"{server.address}/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line:
                        now = time.monotonic()
                        longest, last = max(longest, now - last), now
                        if done := all(each.done() for each in attacks):
                            break
    return longest


@pytest.mark.parametrize("name", HERE)
def test_a_neighbour_goes_on(server, name):
    attack = ATTACKS[name]
    body = fields(server) | attack.more | attack.body
    with ThreadPoolExecutor() as pool:
        attacks = [
            pool.submit(ask, server, attack.path, body | {"temperature": 1})
            for _ in range(attack.clients)
        ]
        waited = silence(server, attacks)
    for each in attacks:
        status, text = each.result()
        assert (status, attack.says in text) == (attack.status, True), text[:2000]
    assert waited <= SILENCE_S, f"{waited:.2f} s; the attack got {json.dumps(text[:200])}"
