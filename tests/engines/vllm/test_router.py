"""SGLang's router before two vLLM servers."""

import json

import pytest

from checkpoints import SHIPPED
from engines.routers import UNIT, check_conversations
from engines.vllm.server import Forked
from needs import needs

FLAGS = (
    "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager",
    "--prefix-match-unit", str(UNIT), "--enable-prompt-tokens-details",
    "--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 3}),
)  # fmt: skip


@pytest.mark.serve
@pytest.mark.long
@needs("router")
def test_a_conversation_stays_with_its_page():
    servers = [Forked(SHIPPED, *FLAGS) for _ in range(2)]
    try:
        check_conversations([server.wait() for server in servers], "vllm:request_success_total")
    finally:
        for server in servers:
            server.close()
