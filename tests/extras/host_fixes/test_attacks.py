"""While an attack lives, a neighbour's stream goes on: the same tests for either engine.

Each environment has one engine, whose server is started once, with drafts.
"""

import importlib
import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import httpx
import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete
from engines.hostile import ask, fields
from engines.server import Server
from patience import looking, waited

pytestmark = pytest.mark.serve

ENGINE = "vllm" if find_spec("vllm") else "sglang"
# Between two pieces of a neighbour's stream, and before its first.
SILENCE_S, TRIES = 1.0, 6
STARTS = {
    "vllm": (
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"),
        *("--max-num-seqs", "32"),
        *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ),
    "sglang": (
        *("--dtype", "float32", "--max-total-tokens", "32768"),
        *("--speculative-algo", "NEXTN", "--speculative-num-steps", "3"),
        *("--tool-call-parser", "hermes"),
    ),
}


@dataclass(frozen=True)
class Attack:
    """What one client asks beside an honest completion, and what it is answered."""

    body: dict[str, Any] | Callable[[int], dict[str, Any]]  # of each client
    status: int = 400
    says: str = ""
    path: str = "/v1/completions"
    engines: tuple[str, ...] = ("vllm", "sglang")
    clients: int = 1  # that ask it at once
    more: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 200})


NESTED = "(((a{1,100}){1,100}){1,100}){40,100}"  # at least 40 letters
AMBIGUOUS = 'root ::= root root root | root root | "a" | ""'
SPACES = NESTED.replace("a", " ")  # of which one token has dozens
BACKTRACKING = r"([\s\S]+)+\x00"
STRINGS = ["".join(random.Random(i).choices("abcdefghij", k=40)) for i in range(4000)]


def constrained(**by: Any) -> dict[str, Any]:
    """A request's fields, by which either engine takes a regex, a grammar or a schema."""
    ((kind, text),) = by.items()
    if ENGINE == "vllm":
        return {"structured_outputs": {kind: text}}
    text = json.dumps(text) if kind == "json" else text
    return {{"regex": "regex", "grammar": "ebnf", "json": "json_schema"}[kind]: text}


def tool(**parameter: Any) -> dict[str, Any]:
    """A chat that must call a tool, by an argument of this schema."""
    schema = {"type": "object", "properties": {"city": parameter}, "required": ["city"]}
    function = {"name": "weather", "parameters": schema, "strict": True}
    return {
        "messages": [{"role": "user", "content": "weather"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
    }


def without_end(client: int) -> dict[str, Any]:
    """A schema that takes seconds to read."""
    of = {"type": "integer", "multipleOf": 5}
    return {"type": "array", "items": of, "minItems": 10**9 + client}


FIELD = {"vllm": "structured_outputs", "sglang": "grammar"}[ENGINE]
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
    "a regex that explodes": Attack(constrained(regex=NESTED), says=FIELD),
    "a regex that explodes within a token": Attack(constrained(regex=SPACES), says=FIELD),
    "an ambiguous grammar": Attack(
        constrained(grammar=AMBIGUOUS) | {"min_tokens": 150}, says=FIELD
    ),
    "one that explodes in 16 answers": Attack(constrained(regex=NESTED) | {"n": 16}, says=FIELD),
    "a pattern in a schema": Attack(
        constrained(json={"type": "string", "pattern": f"^{NESTED}$"}), says=FIELD
    ),
    "a pattern in a required tool's parameter": Attack(
        tool(type="string", pattern=f"^{NESTED}$"), path="/v1/chat/completions", says=FIELD
    ),
    "eight that explode at once": Attack(
        lambda client: constrained(regex=f"{NESTED}[{client}]"), says=FIELD, clients=8
    ),
    "five schemas without end": Attack(
        lambda client: constrained(json=without_end(client)), says=FIELD, clients=5
    ),
    "an enum of 4,000 strings": Attack(constrained(json={"enum": STRINGS}), says=FIELD),
    "a regex that backtracks": Attack(
        {"stop_regex": BACKTRACKING}, says="stop_regex", engines=("sglang",)
    ),
    "one that backtracks in 16 answers": Attack(
        {"stop_regex": BACKTRACKING, "n": 16}, says="stop_regex", engines=("sglang",)
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
    came, done = [time.monotonic()], False
    with httpx.Client(timeout=300) as http, looking() as looks:
        while not done:
            with http.stream("POST", f"{server.address}/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line:
                        came.append(time.monotonic())
                        if done := all(each.done() for each in attacks):
                            break
    return max(waited(since, until, looks) for since, until in pairwise(came))


def wait_beside(server: Server, attack: Attack) -> float:
    """A neighbour's longest wait while clients ask this, which get its answer."""
    of = attack.body if callable(attack.body) else lambda _: attack.body
    body = fields(server) | attack.more | {"temperature": 1}
    with ThreadPoolExecutor() as pool:
        attacks = [
            pool.submit(ask, server, attack.path, body | of(client))
            for client in range(attack.clients)
        ]
        longest = silence(server, attacks)
    for each in attacks:
        status, text = each.result()
        assert (status, attack.says in text) == (attack.status, True), text[:2000]
    return longest


@pytest.mark.parametrize("name", HERE)
def test_a_neighbour_goes_on(server, name):
    """Tried again where others computed, too: a wait that the code causes is in each try."""
    tries = (wait_beside(server, ATTACKS[name]) for _ in range(TRIES))
    longest = next((each for each in tries if each <= SILENCE_S), None)
    assert longest is not None


def test_an_honest_schema_waits_for_no_dear_one(server):
    enum = fields(server) | constrained(json={"enum": STRINGS[::-1]})
    with ThreadPoolExecutor() as pool:
        dear = pool.submit(ask, server, "/v1/completions", enum)
        honest = fields(server) | constrained(json={"enum": ["yes", "no"]})
        status, text = ask(server, "/v1/completions", honest)
        assert not dear.done()
    assert status == 200, text
    assert json.loads(json.loads(text)["choices"][0]["text"]) in ("yes", "no")
