"""vLLM's parsers of tool calls and thinking, with MTP: its server finds what the model wrote."""

from collections.abc import Iterator

import pytest

from engines.parsers import CALLS, check_thinking, check_tool_calls, checkpoint
from engines.vllm.server import Forked

pytestmark = pytest.mark.serve

FLAGS = (
    *("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'),
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--reasoning-parser", "qwen3", "--enable-auto-tool-choice"),
)
GRAMMAR: dict = {"structured_outputs": {}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("parsers") / "model")


@pytest.fixture(scope="module", params=CALLS)
def server(request, model) -> Iterator[Forked]:
    flags = (*FLAGS, "--tool-call-parser", request.param)
    server = Forked(model, *flags, env={"QWEN3NEXT_DRAFTS": "fixed"}).wait()
    server.parser = request.param
    yield server
    server.close()


def test_tool_calls(server):
    check_tool_calls(server, "vllm", server.parser, GRAMMAR)


def test_thinking_and_its_budget(server):
    check_thinking(server, "vllm", GRAMMAR, {"thinking_token_budget": 12})
