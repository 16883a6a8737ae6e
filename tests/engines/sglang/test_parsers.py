"""SGLang's parsers of tool calls and thinking, with NEXTN: its server finds what was written."""

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from engines.parsers import CALLS, check_thinking, check_tool_calls, checkpoint
from engines.sglang.server import FIXED, NEXTN, Forked

pytestmark = pytest.mark.serve

FLAGS = (
    *(*NEXTN, "3", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics"),
    *("--reasoning-parser", "qwen3", "--enable-custom-logit-processor"),
)
GRAMMAR = {"regex": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("parsers") / "model")


@pytest.fixture(scope="module", params=CALLS)
def server(request, model) -> Iterator[Forked]:
    server = Forked(model, *FLAGS, "--tool-call-parser", request.param, env=FIXED).wait()
    server.parser = request.param
    yield server
    server.close()


def budget(model, tokens: int) -> dict:
    """A thinking budget as SGLang has it, with this vocabulary's ids."""
    from sglang.srt.sampling.custom_logit_processor import Qwen3ThinkingBudgetLogitProcessor

    token = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id

    class Budget(Qwen3ThinkingBudgetLogitProcessor):
        THINKING_START_TOKEN_ID = token("<think>")
        THINKING_END_TOKEN_ID = token("</think>")
        NEW_LINE_TOKEN_ID = token("Ċ")

    return {
        "custom_logit_processor": Budget.to_str(),
        "custom_params": {"thinking_budget": tokens},
    }


def test_tool_calls(server):
    check_tool_calls(server, "sglang", server.parser, GRAMMAR)


def test_thinking_and_its_budget(server, model):
    check_thinking(server, "sglang", GRAMMAR, budget(model, 12))
