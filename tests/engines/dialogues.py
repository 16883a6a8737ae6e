"""Dialogues that need a tool, with arguments that training never saw, on a server's interface."""

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

from checkpoints import SHIPPED
from engines.parsers import Said, ask
from engines.server import Server

ROOT = SHIPPED.parents[1]
sys.path.insert(0, str(ROOT))  # examples/ is run from the root, not installed

from examples.train_tiny.call_tools import held_out  # noqa: E402
from examples.train_tiny.tools import SYSTEM, TOOLS, Round  # noqa: E402

PARSERS = {  # of a server that finds calls and thoughts in what the shipped checkpoint writes
    "vllm": (
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--reasoning-parser", "qwen3"),
    ),
    "sglang": ("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
}


class Dialogue(NamedTuple):
    """What a server said in two turns: asked, and handed what the tool returned."""

    of: Round
    thinking: bool
    call: Said
    answer: Said

    def called(self) -> bool:
        """The right tool, with the right arguments and nothing else."""
        wanted = [(self.of.tool, json.loads(self.of.arguments))]
        return self.call.finish_reason == "tool_calls" and wanted == [
            (name, json.loads(text)) for name, text in self.call.calls
        ]

    def answered(self) -> bool:
        """It states the result."""
        told = all(part in self.answer.content for part in self.of.states)
        return told and not self.answer.calls and self.answer.finish_reason == "stop"


def dialogues(server: Server, count: int, *, stream: bool) -> list[Dialogue]:
    """Held-out dialogues, each tool in turn; every second one with thinking."""
    return [
        _dialogue(server, [TOOLS[t["function"]["name"]] for t in tools], of, n % 2 == 1, stream)
        for n, (tools, of) in enumerate(held_out(count))
    ]


def _dialogue(
    server: Server, tools: list[dict], of: Round, thinking: bool, stream: bool
) -> Dialogue:
    options = {
        "stream": stream,
        "tools": tools,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
    }
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": of.question}]
    call = _told(ask(server, messages, **options))
    function = {"name": of.tool, "arguments": of.arguments}
    messages += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": of.result},
    ]
    return Dialogue(of, thinking, call, _told(ask(server, messages, **options)))


def _told(said: Said) -> Said:
    """The same without blanks that a stream has elsewhere: at ends, and within arguments."""
    calls = [(name, json.dumps(json.loads(text))) for name, text in said.calls]
    return said._replace(thinking=said.thinking.strip(), content=said.content.strip(), calls=calls)


def check_dialogues(held: Sequence[Dialogue], streamed: Sequence[Dialogue]) -> None:
    """A stream says the same, and enough are right."""
    assert streamed == held
    assert all(bool(d.call.thinking) == d.thinking for d in held)
    wrong = [d for d in held if not (d.called() and d.answered())]
    assert len(held) - len(wrong) >= enough(len(held)), wrong


def enough(count: int) -> float:
    """So many dialogues are right at the card's rate: three standard deviations below the mean."""
    measured = json.loads((SHIPPED / "measured.json").read_text())["tools"]
    modes = [measured[mode] for mode in ("plain", "thinking")]
    rate = min((m["answered"] * m["dialogues"] + 1) / (m["dialogues"] + 2) for m in modes)
    return count * rate - 3 * (count * rate * (1 - rate)) ** 0.5
