"""The share of held-out dialogues in which a checkpoint calls the right tool: see --help."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .tokenizer import CODER_TEMPLATE
from .tools import CODER, HERMES, ROUNDS, SYSTEM, Arguments, Format, Round, offered

JSON_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>", re.DOTALL)
MODES = {  # format, whether the model thinks first
    "plain": (HERMES, False),
    "thinking": (HERMES, True),
    "coder": (CODER, False),
}
NEW_TOKENS = 96


@dataclass(frozen=True)
class Outcome:
    """What became of one dialogue."""

    of: Round
    called: bool  # the right tool, with the right arguments and nothing else
    answered: bool  # after the right call: the answer states the result
    written: tuple[str, ...]


def held_out(count: int, seed: int = 0) -> Iterator[tuple[list[dict], Round]]:
    """Definitions and a round with held-out arguments, each tool in turn."""
    rng = Random(f"held out {seed}")
    args, names = Arguments(rng, held_out=True), list(ROUNDS)
    for n in range(count):
        name = names[n % len(names)]
        yield offered(rng, name), ROUNDS[name](args)


class Chat:
    """A checkpoint and its own chat template, answering greedily."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def answer(
        self, messages: list[dict], tools: list[dict], style: Format, thinking: bool
    ) -> tuple[str, str]:
        """The assistant's next turn: its thought, and the rest."""
        prompt = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=CODER_TEMPLATE if style is CODER else None,
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=True,
            return_tensors="pt",
        )
        whole = self.model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = self.tokenizer.decode(
            whole[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )
        thought, mark, rest = text.partition("</think>")
        return (thought.strip(), rest.strip()) if mark else ("", text.strip())


def same_call(text: str, of: Round, style: Format) -> bool:
    """Whether the text is the call that the round needs, and no more."""
    if style is CODER:
        return text == style.call(of)
    found = JSON_CALL.fullmatch(text)
    try:
        return bool(found) and json.loads(found[1]) == {
            "name": of.tool,
            "arguments": json.loads(of.arguments),
        }
    except json.JSONDecodeError:
        return False


def outcome(chat: Chat, tools: list[dict], of: Round, style: Format, thinking: bool) -> Outcome:
    """Two turns: the question and the call, the result and the answer."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": of.question}]
    thought, call = chat.answer(messages, tools, style, thinking)
    if not same_call(call, of, style):
        return Outcome(of, False, False, (call,))
    function = {"name": of.tool, "arguments": json.loads(of.arguments)}
    calls = [{"id": "1", "type": "function", "function": function}]
    asked = {"role": "assistant", "content": "", "reasoning": thought, "tool_calls": calls}
    returned = {"role": "tool", "tool_call_id": "1", "content": of.result}
    _, answer = chat.answer([*messages, asked, returned], tools, style, thinking)
    return Outcome(of, True, all(part in answer for part in of.states), (call, answer))


def rates(folder: Path, count: int) -> dict:
    """By mode: shares of dialogues with the right call, and with the right answer after it."""
    chat, found = Chat(folder), {}
    for mode, how in MODES.items():
        outcomes = [outcome(chat, tools, of, *how) for tools, of in held_out(count)]
        found[mode] = {
            "dialogues": count,
            "called": sum(x.called for x in outcomes) / count,
            "answered": sum(x.answered for x in outcomes) / count,
            "failed": [
                {"question": x.of.question, "written": x.written}
                for x in outcomes
                if not x.answered
            ],
        }
    return found


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder that train.py wrote.")],
    count: Annotated[int, typer.Option(help="Dialogues, each in every mode.")] = 100,
) -> None:
    """Play two-turn dialogues with names and numbers that training never saw.

    The model reads a question and the definitions of up to three tools, writes the call, reads what
    the tool returned, and answers. Decoding is greedy, in fp32 from the bf16 weights.
    """
    torch.set_num_threads(1)
    print(json.dumps(rates(checkpoint, count), indent=1))


if __name__ == "__main__":
    typer.run(main)
