"""SGLang's router before two SGLang servers, and SGLang's own two engines."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import SHIPPED
from engines.checks import check_greedy
from engines.clients import eventually
from engines.routers import check_conversations
from engines.sglang.server import NEXTN, Forked
from engines.traffic import source_tokens
from needs import needs

pytestmark = [pytest.mark.serve, pytest.mark.long]

FLAGS = ("--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics", *NEXTN, "3")
PROMPTS = [tuple(source_tokens()[start : start + n]) for start, n in ((0, 20), (300, 600))]


@needs("router")
def test_a_conversation_stays_with_its_page():
    servers = [Forked(SHIPPED, *FLAGS, "--enable-cache-report") for _ in range(2)]
    try:
        check_conversations([server.wait() for server in servers], "sglang:num_requests_total")
    finally:
        for server in servers:
            server.close()


@needs("two-cores")
def test_two_data_parallel_engines_answer_as_one(reference):
    server = Forked(SHIPPED, *FLAGS, "--dp-size", "2").wait()
    try:
        with ThreadPoolExecutor(4) as clients:
            asked = clients.map(lambda prompt: server.greedy([prompt], 24), PROMPTS * 2)
            answers = [answer for (answer,) in asked]

        def each_drafts() -> bool:
            server.greedy(PROMPTS * 2, 24)
            drafted = server.by_label("sglang:qwen3next_draft_length_sum", "dp_rank")
            return set(drafted) == {"0", "1"} and min(drafted.values()) > 0

        assert eventually(each_drafts)
    finally:
        server.close()
    check_greedy(reference(SHIPPED), PROMPTS * 2, answers)
