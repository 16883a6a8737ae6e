"""Qwen-Agent, the library, as the client of a server: its calls reach its tools and come back."""

import json
import re
import subprocess

from engines.dialogues import ROOT, Round, enough, held_out
from engines.parsers import NO_THINKING, THINKING
from engines.server import TIMEOUT_S, Server

PYTHON = ROOT / ".qwen-agent" / "bin" / "python"
# A function of the client, one of an MCP server over stdio, and the code interpreter.
TOOLS = ("multiply", "shop-count_parts", "code_interpreter")
ASKED = 12


def check_qwen_agent(server: Server, thinking: bool) -> None:
    """Numbers that training never saw: the right tool runs, the answer has its result."""
    asked = [of for _, of in held_out(100) if of.tool in TOOLS][:ASKED]
    client = ROOT / "tests" / "engines" / "agent_client.py"
    body = json.dumps(THINKING if thinking else NO_THINKING)
    questions = [of.question for of in asked]
    done = subprocess.run(
        [PYTHON, client, f"{server.address}/v1", server.model, body, *questions],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    chats = [json.loads(line) for line in done.stdout.splitlines()]
    right = [_right(of, chat) for of, chat in zip(asked, chats, strict=True)]
    assert sum(right) >= enough(len(asked)), chats
    assert {of.tool for of, ok in zip(asked, right, strict=True) if ok} == set(TOOLS), chats


def _right(of: Round, chat: list[dict]) -> bool:
    """One call, the tool's own result, and an answer that states it."""
    said = [m for m in chat if m["content"].strip() or m.get("function_call")]
    if [m["role"] for m in said] != ["assistant", "function", "assistant"]:
        return False
    call, returned, answer = said
    name, arguments = call["function_call"]["name"], call["function_call"]["arguments"]
    if (name, json.loads(arguments)) != (of.tool, json.loads(of.arguments)):
        return False
    result = _result(of)
    assert returned["content"] == result  # the tool ran, with these arguments
    return f" {re.sub(r'[^0-9-]', '', result)}" in answer["content"]


def _result(of: Round) -> str:
    """What the tool returns, worked out here."""
    if of.tool == "shop-count_parts":
        return str(json.loads(of.arguments)["part"] * 7919 % 500)
    return of.result
