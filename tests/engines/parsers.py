"""Tool calls and thinking, as a server's parsers find them in answers that a grammar writes.

A grammar makes the shipped checkpoint write calls of a tool that it does not know, as Qwen3-Coder
(`qwen3_coder`) and Qwen3 (`hermes`) do; thinking ends where its budget does, or before.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import SHIPPED
from engines.clients import Messages, chat
from engines.figures import drafts
from engines.schema import SCHEMA, check_schema
from engines.server import Server
from family import rewrite

sys.path.insert(0, str(SHIPPED.parents[1]))  # examples/ is run from the root, not installed

from examples.train_tiny.tokenizer import MARKS

A, B = "[1-9][0-9]{2,5}", "[a-z]{3,12}"
CALLS = {  # of one tool, in each parser's format
    "qwen3_coder": "<tool_call>\n<function=repeat>\n<parameter=times>\n{A}\n</parameter>\n"
    "<parameter=word>\n{B}\n</parameter>\n</function>\n</tool_call>",
    "hermes": '<tool_call>\n\\{{"name": "repeat", "arguments": \\{{"times": {A}, "word": "{B}"'
    "\\}}\\}}\n</tool_call>",
}
REPEAT = {
    "type": "function",
    "function": {
        "name": "repeat",
        "parameters": {
            "type": "object",
            "properties": {"times": {"type": "integer"}, "word": {"type": "string"}},
            "required": ["times", "word"],
        },
    },
}
MESSAGES: Messages = [{"role": "user", "content": "Repeat a word."}]
THINKING, NO_THINKING = ({"chat_template_kwargs": {"enable_thinking": x}} for x in (True, False))
BUDGETS = (0, 3, 12)  # tokens of thinking


class Said(NamedTuple):
    """An answer in a chat, as its client gets it."""

    thinking: str
    content: str
    calls: list[tuple[str, str]]
    finish_reason: str


def checkpoint(folder: Path, layout: str) -> Path:
    """The shipped checkpoint; in Qwen3.5's layout, as a `text` model or `wrapped` with a tower."""
    if layout == "qwen3-next":
        return SHIPPED
    return rewrite(SHIPPED, folder, wrapped=layout == "wrapped")


def check_tool_calls(server: Server, engine: str, parser: str, grammar: dict[str, Any]) -> None:
    """One and two calls: found whole and in a stream, while drafts are accepted.

    Args:
        grammar: the engine's way to ask for a regular expression, but for that.
    """
    call = CALLS[parser].format(A=A, B=B)
    for count in (1, 2):
        asked = NO_THINKING | held("\n".join([call] * count), grammar)
        before = _accepted(server, engine)
        said = ask(server, tools=[REPEAT], tool_choice="auto", extra_body=asked)
        assert [name for name, _ in said.calls] == ["repeat"] * count, said
        for _, arguments in said.calls:
            found = json.loads(arguments)
            assert found.keys() == {"times", "word"}
            assert re.fullmatch(A, str(found["times"])), found
            assert re.fullmatch(B, found["word"]), found
        assert said.finish_reason == "tool_calls"
        assert not said.content.strip()
        again = ask(server, stream=True, tools=[REPEAT], tool_choice="auto", extra_body=asked)
        assert [(name, json.loads(text)) for name, text in again.calls] == [
            (name, json.loads(text)) for name, text in said.calls
        ]
        assert again.finish_reason == "tool_calls"
        assert _accepted(server, engine) > before


def check_schema_in_a_chat(server: Server, engine: str) -> None:
    """An answer follows a JSON schema, whole and in a stream, while drafts are accepted."""
    asked = {"type": "json_schema", "json_schema": {"name": "sizes", "schema": SCHEMA}}
    before = _accepted(server, engine)
    said = ask(server, response_format=asked, extra_body=NO_THINKING)
    check_schema(said.content)
    assert said.finish_reason == "stop"
    assert ask(server, stream=True, response_format=asked, extra_body=NO_THINKING) == said
    assert _accepted(server, engine) > before


def check_thinking(
    server: Server, engine: str, grammar: dict[str, Any], budget: Callable[[int], dict[str, Any]]
) -> None:
    """What is thought and what is said are apart, whole and in a stream; a budget ends thinking.

    Args:
        budget: the engine's way to ask for one of so many tokens.
    """
    before = _accepted(server, engine)
    whole = _thought(server, THINKING | held(B, grammar))
    assert whole > BUDGETS[1] + 1, "the model ends its thought before a budget does"
    for tokens in BUDGETS:
        asked = THINKING | held(B, grammar) | budget(tokens)
        said = ask(server, extra_body=asked)
        assert not any(mark in said.thinking + said.content for mark in MARKS)
        assert re.fullmatch(B, said.content.strip()), said
        again = ask(server, stream=True, extra_body=asked)
        assert (again.thinking.strip(), again.content.strip()) == (
            said.thinking.strip(),
            said.content.strip(),
        )
        thought = _thought(server, asked)
        assert thought - min(tokens, whole) in (-1, 0, 1)  # a line break may count, or end it
    assert said.thinking.strip()
    assert _accepted(server, engine) > before
    plain = ask(server, extra_body=held(B, grammar) | NO_THINKING)
    assert not plain.thinking
    assert re.fullmatch(B, plain.content.strip())


def _thought(server: Server, asked: dict[str, Any]) -> int:
    """The number of tokens before the one that ends thinking, or of all."""
    (choice,) = chat(server, MESSAGES, 300, logprobs=True, extra_body=asked).choices
    tokens = [entry.token for entry in choice.logprobs.content]
    return [*tokens, "</think>"].index("</think>")


def ask(
    server: Server, messages: Messages = MESSAGES, *, stream: bool = False, **options: Any
) -> Said:
    """A greedy answer in a chat, all at once or put together from its chunks."""
    if not stream:
        choice = chat(server, messages, 300, **options).choices[0]
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
        return Said(
            _thinking(choice.message), choice.message.content or "", calls, choice.finish_reason
        )
    thinking, content, reason, parts = "", "", "", dict[int, tuple[str, str]]()
    for chunk in chat(server, messages, 300, stream=True, **options):
        for choice in chunk.choices:
            thinking += _thinking(choice.delta)
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for c in choice.delta.tool_calls or ():
                name, text = parts.get(c.index, ("", ""))
                parts[c.index] = (
                    name + (c.function.name or ""),
                    text + (c.function.arguments or ""),
                )
    return Said(thinking, content, list(parts.values()), reason)


def _thinking(message: Any) -> str:
    """vLLM calls it `reasoning`, SGLang `reasoning_content`."""
    names = ("reasoning", "reasoning_content")
    return next((text for name in names if (text := getattr(message, name, None))), "")


def held(regex: str, grammar: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that hold its answer to a regular expression."""
    (name,) = grammar
    inner = grammar[name]
    return {name: inner | {"regex": regex} if isinstance(inner, dict) else regex}


def _accepted(server: Server, engine: str) -> float:
    return sum(drafts(server, engine)["accepted"].values())
