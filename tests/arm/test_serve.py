"""`vllm serve` gives one text with MTP and without, on x86 and on the ARM that qemu emulates."""

import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete
from engines.vllm.server import Server

pytestmark = [pytest.mark.long, pytest.mark.serve]

START_SECONDS = 3600  # emulated: each of its processes imports vLLM for minutes
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
MTP = ("--speculative-config", '{"method": "qwen3_next_mtp", "num_speculative_tokens": 3}')
TEXT = (
    "1\n    return 1\n\n"
    "def add(a, b):\n    return a + b\n    return a + b\n\n"
    "def add(a, b):\n    return a + b\n    return a + b\n\n"
    "def add(a, b"
)


def answer(*flags: str) -> tuple[str, float]:
    """What a server of the shipped checkpoint answers, and how many drafted tokens are in it."""
    server = Server(SHIPPED, *FLAGS, *flags, env={"QWEN3NEXT_DRAFTS": "fixed"})
    try:
        text = complete(server.wait(START_SECONDS), PROMPTS[1])
        metrics = server.metrics()
    finally:
        server.close()
    return text, metrics.get("vllm:spec_decode_num_accepted_tokens_total", 0)


def test_one_text_with_mtp_and_without():
    assert answer() == (TEXT, 0)
    text, accepted = answer(*MTP)
    assert text == TEXT
    assert accepted
