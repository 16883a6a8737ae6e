"""Qwen-Agent, the library, as the client of a server: its calls reach its tools and come back.

The shipped checkpoint calls no tools: a grammar makes it write a call, with numbers that it picks,
and then an answer.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.parsers import NO_THINKING, B, held
from engines.server import TIMEOUT_S, Server

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is run from the repository's root, not installed

from examples.train_tiny.tools import CODER, HERMES, Round  # noqa: E402

PYTHON = ROOT / ".qwen-agent" / "bin" / "python"
needs_qwen_agent = pytest.mark.skipif(
    not PYTHON.exists(), reason="`make test-long` installs Qwen-Agent"
)
ANY, NUMBER = "777", "[1-9][0-9]{1,3}"  # any number, and what the model may pick for it
CALLS = {  # a function of the client, one of an MCP server over stdio, and the code interpreter
    "multiply": {"a": int(ANY), "b": int(ANY)},
    "shop-count_parts": {"part": int(ANY)},
    "code_interpreter": {"code": f"print({ANY} + {ANY})"},
}


def check_qwen_agent(server: Server, parser: str, grammar: dict[str, Any]) -> None:
    """Each call is found in the stream, its tool runs, and the next request has its result."""
    style = HERMES if parser == "hermes" else CODER
    asked = {
        f"Call {tool}.": [
            NO_THINKING | held(regex(style.call(Round("", "", tool, json.dumps(given)))), grammar),
            NO_THINKING | held(B, grammar),
        ]
        for tool, given in CALLS.items()
    }
    command = [PYTHON, ROOT / "tests" / "engines" / "agent_client.py"]
    done = subprocess.run(
        [*command, f"{server.address}/v1", server.model, json.dumps(asked)],
        env=os.environ | {"QWEN_AGENT_MAX_LLM_CALL_PER_RUN": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    chats = [json.loads(line) for line in done.stdout.splitlines()]
    for (tool, given), (_, *chat) in zip(CALLS.items(), chats, strict=True):
        said = [m for m in chat if m["content"].strip() or m.get("function_call")]
        assert len(said) == 3, chat
        call, returned, answer = said
        arguments = json.loads(call["function_call"]["arguments"])
        assert call["function_call"]["name"] == tool
        assert arguments.keys() == given.keys()
        assert (returned["role"], returned["content"]) == ("function", result(tool, arguments))
        assert re.fullmatch(B, answer["content"].strip()), answer


def regex(call: str) -> str:
    """What a call may be: this text, with any numbers."""
    return re.sub(r"([{}()+*.?\[\]|\\^$])", r"\\\1", call).replace(ANY, NUMBER)


def result(tool: str, arguments: dict[str, Any]) -> str:
    """What the tool returns, worked out here."""
    if tool == "multiply":
        return str(arguments["a"] * arguments["b"])
    if tool == "shop-count_parts":
        return str(arguments["part"] * 7919 % 500)
    numbers = re.fullmatch(rf"print\(({NUMBER}) \+ ({NUMBER})\)", arguments["code"])
    return f"stdout:\n\n```\n{int(numbers[1]) + int(numbers[2])}\n\n```"
