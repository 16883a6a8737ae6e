"""SGLang's parsers of tool calls and thinking, with NEXTN: its server finds what was written."""

from collections.abc import Iterator
from functools import partial

import pytest
from tokenizers import Tokenizer

from engines.agents import check_qwen_agent
from engines.hostile import ask
from engines.parsers import (
    check_schema_in_a_chat,
    check_thinking,
    check_tool_calls,
    checkpoint,
)
from engines.sglang.schema import TERSE
from engines.sglang.server import FIXED, NEXTN, Forked
from needs import needs
from tiers import long_except

pytestmark = pytest.mark.serve

FLAGS = (
    *(*NEXTN, "3", "--dtype", "float32", "--max-total-tokens", "8192", "--enable-metrics"),
    *("--reasoning-parser", "qwen3", "--enable-custom-logit-processor", TERSE),
)
GRAMMAR = {"regex": ""}


STRICT = ("--enable-strict-thinking",)
CASES = {  # parser, layout, flags
    "qwen3-next": ("hermes", "qwen3-next", ()),
    "qwen3.5": ("qwen3_coder", "text", STRICT),
    "qwen3.5-wrapped": ("qwen3_coder", "wrapped", ("--language-model-only",)),
}


@pytest.fixture(scope="module", params=long_except(["qwen3-next"], CASES))
def server(request, tmp_path_factory) -> Iterator[Forked]:
    parser, layout, flags = CASES[request.param]
    model = checkpoint(tmp_path_factory.mktemp("parsers") / "model", layout)
    server = Forked(model, *FLAGS, *flags, "--tool-call-parser", parser, env=FIXED).wait()
    server.parser, server.strict = parser, flags == STRICT
    yield server
    server.close()


def strict_budget(tokens: int) -> dict:
    """A thinking budget where --enable-strict-thinking finds the vocabulary's ids by itself."""
    return {"custom_params": {"thinking_budget": tokens}}


def budget(model, tokens: int) -> dict:
    """A thinking budget by a custom logit processor, with this vocabulary's ids."""
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


def test_thinking_and_its_budget(server):
    asked = strict_budget if server.strict else partial(budget, server.folder)
    check_thinking(server, "sglang", GRAMMAR, asked)


def test_a_custom_logit_processor_that_is_none_is_refused(server):
    for processor in ("x", '{"callable": "80"}'):
        status, text = ask(server, "/generate", {"text": "a", "custom_logit_processor": processor})
        assert (status, "custom_logit_processor is " in text) == (400, True)


def test_a_json_schema(server):
    check_schema_in_a_chat(server, "sglang")


@pytest.mark.long
@needs("qwen-agent")
@pytest.mark.parametrize("thinking", [False, True], ids=["plain", "thinking"])
@pytest.mark.parametrize("server", ["qwen3-next"], indirect=True)
def test_qwen_agent(server, thinking):
    check_qwen_agent(server, thinking)
