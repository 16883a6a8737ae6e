"""vLLM's parsers of tool calls and thinking, with MTP: its server finds what the model wrote."""

from collections.abc import Iterator

import pytest

from engines.agents import check_qwen_agent
from engines.parsers import (
    check_schema_in_a_chat,
    check_thinking,
    check_tool_calls,
    checkpoint,
)
from engines.vllm.server import Forked
from needs import needs
from tiers import long_except

pytestmark = pytest.mark.serve

FLAGS = (
    *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'),
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--language-model-only"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
GRAMMAR: dict = {"structured_outputs": {}}
CASES = {  # parser, layout
    "qwen3-next": ("hermes", "qwen3-next"),
    "qwen3.5": ("qwen3_coder", "text"),
    "qwen3.5-wrapped": ("qwen3_coder", "wrapped"),
}


@pytest.fixture(scope="module", params=long_except(["qwen3.5-wrapped"], CASES))
def server(request, tmp_path_factory) -> Iterator[Forked]:
    parser, layout = CASES[request.param]
    model = checkpoint(tmp_path_factory.mktemp("parsers") / "model", layout)
    flags = (*FLAGS, "--tool-call-parser", parser)
    server = Forked(model, *flags, env={"QWEN3NEXT_DRAFTS": "fixed"}).wait()
    server.parser = parser
    yield server
    server.close()


def test_tool_calls(server):
    check_tool_calls(server, "vllm", server.parser, GRAMMAR)


def test_thinking_and_its_budget(server):
    check_thinking(server, "vllm", GRAMMAR, lambda tokens: {"thinking_token_budget": tokens})


def test_a_json_schema(server):
    check_schema_in_a_chat(server, "vllm")


@pytest.mark.long
@needs("qwen-agent")
@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize("server", ["qwen3-next"], indirect=True)
def test_qwen_agent(server, thinking):
    check_qwen_agent(server, thinking)
