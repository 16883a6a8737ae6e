"""Speculation changes no token: any number of drafts, trees, and changing numbers, under load."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import openai
import pytest

from checkpoints import SHIPPED
from engines.clients import eventually
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from engines.traffic import Request, requests, send, source_tokens
from reference import Ids
from tiers import long_except

pytestmark = pytest.mark.serve

CLIENTS, ALONE = 16, 8
# Prompts in chunks off the pages' grid, and memory for a third of the clients.
FLAGS = (
    "--dtype", "float32", "--chunked-prefill-size", "67", "--max-running-requests", "16",
    "--max-total-tokens", "820", "--max-mamba-cache-size", "48", "--schedule-conservativeness",
    "0.1", "--enable-metrics",
)  # fmt: skip
# A request is retracted every so many steps, besides where memory runs out, which hangs on timing.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
NO_CACHE = ("--disable-radix-cache",)
# Drafts in some steps and of some requests only; no room for pending tokens of prompts above 290.
# A step beside decoding requests reads 8 tokens of prompts, in turns: none fits the budget.
PACED = {"QWEN3NEXT_STEP_SECONDS": "0.000001"}
SWITCHING = {"TEST_DRAFTS": "0,3,021,0,0,2031,30,0,310", "TEST_PENDING": "300000"}
TREE = ("--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "5")
CASES: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
    "steps-1": (1, (), FIXED),
    "steps-2_topk-2": (2, TREE, FIXED),
    "steps-3_no-cache": (3, NO_CACHE, FIXED),
    "adaptive": (3, (), {}),
    "switching": (3, (), SWITCHING | PACED),
}
ALWAYS = ("switching",)  # the other cases, each a server of its own, with --long
Answers = Sequence[Ids | None]  # None: the client hung up


def answers(batch: Sequence[Request], *flags: str, env: dict[str, str] | None = None) -> Answers:
    """What the requests get: the first few alone, then all at once."""
    server = Forked(SHIPPED, *FLAGS, *flags, env=RETRACT | (env or {})).wait()
    try:
        found = send(server, batch[:ALONE], 1) + send(server, batch, CLIENTS)
        if PACED.items() <= (env or {}).items():
            tried = count()  # each time other prompts, which are not in the cache
            assert eventually(lambda: goes_on_beside_prompts(server, next(tried)))
            check_a_pause(server)
        metrics = server.metrics()
        steps = server.by_label("sglang:qwen3next_steps_total", "kind")
    finally:
        server.close()
    # else the test would not see what it is for
    assert metrics.get("sglang:num_retracted_requests_total", 0) > 0
    assert (metrics.get("sglang:cached_tokens_total", 0) > 0) == (NO_CACHE[0] not in flags)
    if "TEST_DRAFTS" in (env or {}):
        assert min(steps["plain"], steps["verify"]) > 0
    assert sum(answer is not None for answer in found) >= 0.8 * len(found)
    return found


def goes_on_beside_prompts(server: Server, tried: int) -> bool:
    """Whether a stream ends before a long prompt is read, and a short one comes between."""
    ids = source_tokens()
    at = 40 + 77 * tried % (len(ids) - 600)
    firsts: list[str] = []

    async def ask(client: openai.AsyncOpenAI, name: str, prompt: list[int], tokens: int) -> None:
        options = {"extra_body": {"ignore_eos": True}, "stream": True, "temperature": 0}
        stream = await client.completions.create(
            model=server.model, prompt=prompt, max_tokens=tokens, **options
        )
        async for _ in stream:
            if name == "stream" and not others:
                others.append(asyncio.create_task(ask(client, "long", ids[at : at + 500], 1)))
                others.append(asyncio.create_task(ask(client, "short", ids[at + 20 : at + 40], 1)))
            firsts.append(name)

    others: list[asyncio.Task[None]] = []

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(**server.openai_options()) as client:
            await ask(client, "stream", ids[:9], 160)
            await asyncio.gather(*others)

    asyncio.run(all_of_them())
    beside = firsts[firsts.index("short") :]
    return firsts[-1] == "long" and "stream" in beside


def check_a_pause(server: Server) -> None:
    """Two prompts, both read in part, wait for its end; then they get the same answers."""
    ids = source_tokens()
    prompts = [tuple(ids[900:1300]), tuple(ids[1400:1650])]
    wanted = [server.greedy([one], 8)[0].token_ids for one in prompts]
    server.forget()

    def reads_both() -> bool:
        load = server.load()
        return load["num_used_tokens"] > 0 == load["num_waiting_reqs"]

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.greedy, prompts, 8)
        assert eventually(reads_both)
        server.post("/pause_generation", mode="retract")
        assert eventually(lambda: server.metrics()["sglang:num_queue_reqs"] == 2)
        server.post("/continue_generation")
        assert [answer.token_ids for answer in asked.result()] == wanted


@pytest.fixture(scope="module")
def traffic(size) -> Sequence[Request]:
    """The second begins like the first, whose end it finds in the cache.

    Behind the first few stand some that outgrow the memory together: of an answer that may end
    early, SGLang reserves only a part, and lets others in as soon as the first ends.
    """
    ids = source_tokens()
    alike = [Request(tuple(ids[:length]), 8) for length in (500, 600)]
    grow = [
        Request(tuple(ids[10 * i :][:12]), 16 * i + 16, ignore_eos=False) for i in range(CLIENTS)
    ]
    mixed = requests(size(28, 120), seed=8, abort_share=0.15, tokens=32)
    return [*alike, *mixed[:ALONE], *grow, *mixed[ALONE:]]


@pytest.fixture(scope="module")
def without_drafts(traffic) -> Answers:
    return answers(traffic)


@pytest.mark.parametrize("case", long_except(ALWAYS, CASES))
def test_the_same_tokens_as_without_drafts(traffic, without_drafts, case):
    steps, flags, env = CASES[case]
    assert answers(traffic, *NEXTN, str(steps), *flags, env=env) == without_drafts
