"""An agent on a running server: Qwen-Agent with a function, an MCP server and its interpreter.

Its packages are those of requirements/qwen-agent.txt: `make .qwen-agent/.installed` puts them into
an environment of their own.

The server needs a tool parser, and a reasoning parser for --thinking:

    vllm serve MODEL --enable-auto-tool-choice --tool-call-parser hermes
    python -m sglang.launch_server --model-path MODEL --tool-call-parser qwen
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar

import typer

MISSING = ""
try:
    from openai import OpenAI, OpenAIError
    from openai.types.chat import ChatCompletionChunk
    from qwen_agent.agents import Assistant
    from qwen_agent.llm.oai import TextChatAtOAI
    from qwen_agent.tools.base import BaseTool, register_tool
except ImportError as error:  # --help needs none
    MISSING = str(error)
    Assistant = BaseTool = ChatCompletionChunk = TextChatAtOAI = object

    def register_tool(name: str):
        """Registers nothing."""
        return lambda tool: tool


SHOP = {"command": sys.executable, "args": [str(Path(__file__).with_name("shop_server.py"))]}


@register_tool("multiply")
class Multiply(BaseTool):
    """A function of this program."""

    description = "The product of two numbers."
    parameters: ClassVar = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    }

    def call(self, params: str, **_: object) -> str:
        """The product, for arguments as JSON."""
        given = json.loads(params)
        return str(given["a"] * given["b"])


class Served(TextChatAtOAI):
    """Qwen-Agent's client of a server, with vLLM's streams in the form that it reads.

    vLLM leaves `arguments` out where a call begins, and calls a thought `reasoning`.
    """

    def __init__(self, cfg: dict):
        super().__init__(cfg)
        create = self._chat_complete_create

        def chunks(**options: object) -> Iterator[ChatCompletionChunk]:
            for chunk in create(**options):
                for choice in chunk.choices:
                    for call in choice.delta.tool_calls or ():
                        call.function.arguments = call.function.arguments or ""
                    if thought := getattr(choice.delta, "reasoning", None):
                        choice.delta.reasoning_content = thought
                yield chunk

        self._chat_complete_create = chunks


def agent(base_url: str, model: str, folder: str, body: dict) -> Assistant:
    """Qwen-Agent's assistant with all three kinds of tools.

    Args:
        folder: where its interpreter works.
        body: more fields of each request.
    """
    served = Served(
        {
            "model": model,
            "model_server": base_url,
            "api_key": "unused",
            "generate_cfg": {
                "use_raw_api": True,  # the server writes the prompt and finds the calls
                "temperature": 0.0,
                "extra_body": body,
            },
        }
    )
    return Assistant(
        llm=served,
        system_message="You are a helpful assistant.",
        function_list=[
            "multiply",
            {"mcpServers": {"shop": SHOP}},
            {"name": "code_interpreter", "work_dir": folder},
        ],
    )


def main(
    questions: Annotated[list[str], typer.Argument(help="Each is answered in turn.")],
    base_url: Annotated[
        str, typer.Option(help="Address of the server's OpenAI-compatible API.")
    ] = "http://localhost:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Name as the server lists it; the first one by default.")
    ] = None,
    thinking: Annotated[bool, typer.Option(help="Let the model think first.")] = False,
) -> None:
    """Ask an agent that can multiply, count a shop's parts over MCP, and run Python.

    "What is 4321 times 765?" "How many of part 482 are in stock?" "Use Python to compute 12 + 30."

    Needs qwen-agent, openai and mcp: make .qwen-agent/.installed, then run this script by
    .qwen-agent/bin/python.
    """
    if MISSING:
        typer.echo(f"{MISSING}: see --help", err=True)
        raise typer.Exit(1)
    try:  # also with a model's name: Qwen-Agent would ask again and again, and end in a traceback
        listed = OpenAI(base_url=base_url, api_key="unused").models.list()
    except OpenAIError as error:
        typer.echo(f"{base_url}: {error} Is a server running?", err=True)
        raise typer.Exit(1) from error
    model = model or listed.data[0].id
    body = {"chat_template_kwargs": {"enable_thinking": thinking}}
    with TemporaryDirectory() as folder:
        bot = agent(base_url, model, folder, body)
        for question in questions:
            *_, messages = bot.run([{"role": "user", "content": question}])
            typer.echo("\n".join(map(said, messages)))


def said(message: dict) -> str:
    """One line for the reader: a thought, a call, a tool's result, or the answer."""
    if thought := message.get("reasoning_content"):
        return f"thinks: {thought.strip()}"
    if asked := message.get("function_call"):
        return f"calls {asked['name']}({asked['arguments']})"
    return f"{message.get('name') or message['role']}: {message['content'].strip()}"


if __name__ == "__main__":
    typer.run(main)
