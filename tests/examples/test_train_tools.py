"""examples/train_tiny: dialogues that call tools, their tokens, and training that continues."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # examples/ is run from the repository's root, not installed

from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from examples.train_tiny import recipe as r  # noqa: E402
from examples.train_tiny import tools as t  # noqa: E402
from examples.train_tiny.batches import (  # noqa: E402
    LOOK_AHEAD,
    dialogue_windows,
    encode_dialogue,
    mixed,
)
from examples.train_tiny.call_tools import held_out, same_call  # noqa: E402
from examples.train_tiny.corpus import END_OF_TEXT, IM_END, Document, words  # noqa: E402
from examples.train_tiny.tokenizer import (  # noqa: E402
    CODER_TEMPLATE,
    MARKS,
    VOCAB_SIZE,
    save_tokenizer,
    with_marks,
)

SHIPPED = ROOT / "examples" / "qwen3next-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return with_marks(Tokenizer.from_file(str(SHIPPED / "tokenizer.json")))


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """The tokenizer with its chat template, as transformers loads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def rounds(held_out: bool, count: int = 30) -> list[t.Round]:
    """Some rounds of every tool."""
    args = t.Arguments(Random(1), held_out)
    return [make(args) for make in t.ROUNDS.values() for _ in range(count)]


def test_a_mark_is_one_token_and_the_rest_of_the_vocabulary_stays(tokenizer):
    old = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    assert [tokenizer.encode(mark).ids for mark in MARKS] == [
        [VOCAB_SIZE - len(MARKS) + n] for n in range(len(MARKS))
    ]
    assert tokenizer.get_vocab_size() == old.get_vocab_size() == VOCAB_SIZE
    text = "def add(a, b):\n    return a + b\n"
    assert tokenizer.encode(text).ids == old.encode(text).ids
    assert with_marks(tokenizer).to_str() == tokenizer.to_str()


def test_training_never_sees_a_held_out_argument():
    trained, kept = rounds(held_out=False, count=200), rounds(held_out=True, count=200)
    assert not {x.question for x in trained} & {x.question for x in kept}
    for numbers in ({"a", "b"}, {"order"}, {"part"}):
        seen = [
            {
                value
                for x in some
                for name, value in json.loads(x.arguments).items()
                if name in numbers
            }
            for some in (trained, kept)
        ]
        assert all(seen)
        assert not seen[0] & seen[1]


def test_names_in_training_are_words_or_made_up_and_never_held_out():
    real = {*t.HELD_OUT_CITIES.split(), *t.HELD_OUT_NAMES.split()}
    known = [name.lower() for name in sorted(real)] + ["queue", "parser"] * 30
    text = "".join(islice(t.dialogues(0, known), 200))
    assert not real & set(re.findall(r"\w+", text))
    args = t.Arguments(Random(1), held_out=False, words=known)
    names = [args.name(t.HELD_OUT_CITIES) for _ in range(400)]
    drawn = [name for name in names if name in ("Queue", "Parser")]
    assert 60 < len(drawn) < 250  # one in three: a real name is drawn again, as a word or made up
    assert len(set(names)) > 100
    greeted = set(re.findall(r"Hello, (\w+)!<", text))
    assert len(greeted) > 20
    assert all(re.search(rf"(name is|to|am|greet) {name}\.", text) for name in greeted)


def test_the_words_of_a_corpus_are_whole_and_in_small_letters():
    text = "Read a file_name, then READ it: x1 abc2 naïve encyclopaedia io.open über"
    docs = [Document("a.py", text, "source"), Document("b.py", "read then", "source")]
    assert words(docs) == ["file", "name", "open", "read", "then"]


def test_dialogues_are_the_same_every_time():
    assert list(islice(t.dialogues(3), 5)) == list(islice(t.dialogues(3), 5))
    assert list(islice(t.dialogues(3), 5)) != list(islice(t.dialogues(4), 5))
    assert list(held_out(12)) == list(held_out(12))
    assert {of.tool for _, of in held_out(12)} == t.ROUNDS.keys() == t.TOOLS.keys()


@pytest.mark.parametrize("message", ["", t.SYSTEM], ids=["tools only", "system message"])
@pytest.mark.parametrize(
    ("style", "template", "thinking"),
    [(t.HERMES, None, False), (t.HERMES, None, True), (t.CODER, CODER_TEMPLATE, False)],
    ids=["plain", "thinking", "coder"],
)
def test_a_dialogue_is_what_the_chat_template_writes(chat, style, template, thinking, message):
    for tools, of in held_out(12):
        before, after = (t.thought(of, returned)[8:-11] for returned in (False, True))
        function = {"name": of.tool, "arguments": json.loads(of.arguments)}
        turns = [
            {"role": "user", "content": of.question},
            {
                "role": "assistant",
                "content": None,
                "reasoning": before if thinking else None,
                "tool_calls": [{"id": "1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "1", "content": of.result},
            {"role": "assistant", "content": of.answer, "reasoning_content": after * thinking},
        ]
        first = [{"role": "system", "content": message}] if message else []
        options = {"tools": tools, "tokenize": False, "chat_template": template}
        text = chat.apply_chat_template(first + turns, **options)
        assert text == style.system(tools, message) + t.written(of, style, lambda: thinking)
        options |= {"add_generation_prompt": True, "enable_thinking": thinking}
        assert text.startswith(chat.apply_chat_template(first + turns[:1], **options))


def test_only_what_the_assistant_writes_is_learnt(tokenizer):
    of = rounds(held_out=False)[0]
    text = t.HERMES.system([t.TOOLS[of.tool]], t.SYSTEM)
    text += t.written(of, t.HERMES, lambda: True) + END_OF_TEXT
    ids = encode_dialogue(tokenizer, text)
    read = r.read(torch.from_numpy(ids)).tolist()
    assert tokenizer.decode(read, skip_special_tokens=False) == text
    learnt = tokenizer.decode(ids[ids >= 0].tolist(), skip_special_tokens=False)
    before, after = (
        t.thought(of, returned).removeprefix("<think>\n") for returned in (False, True)
    )
    assert learnt == f"{before}{t.json_call(of)}{IM_END}{after}{of.answer}{IM_END}"


def test_windows_begin_with_a_dialogue(tokenizer):
    windows = list(islice(dialogue_windows(tokenizer, t.dialogues(0), 256), 4))
    again = list(islice(dialogue_windows(tokenizer, t.dialogues(0), 256), 4))
    for window, same in zip(windows, again, strict=True):
        assert window.shape == (1, 256 + LOOK_AHEAD)
        assert torch.equal(window, same)
        assert window[0, 0] == ~tokenizer.token_to_id("<|im_start|>")


def test_micro_batches_are_mixed_by_their_share():
    first, second = (iter(lambda n=n: torch.tensor(n), None) for n in (0, 1))
    drawn = [x.item() for x in islice(mixed(first, second, 0.75, np.random.default_rng(0)), 400)]
    assert 0.65 < sum(drawn) / len(drawn) < 0.85


def test_tokens_that_are_only_read_have_no_loss():
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 6, 8), torch.randn(11, 8)
    ids = torch.tensor([[3, ~4, 5, ~0, 7, ~10]])
    learnt = [0, 2, 4]
    part = r.head_loss(hidden[:, learnt], head, ids[:, learnt])
    torch.testing.assert_close(r.head_loss(hidden, head, ids), part)
    assert r.head_loss(hidden, head, -1 - ids.abs()) == 0
    assert r.read(ids).tolist() == [[3, 4, 5, 0, 7, 10]]


@pytest.mark.parametrize("style", [t.HERMES, t.CODER], ids=["hermes", "coder"])
def test_a_call_counts_only_whole_and_right(style):
    of = t.Round("", "", "multiply", '{"a": 12, "b": 30}')
    right = style.call(of)
    assert same_call(right, of, style)
    for wrong in (
        right.replace("12", "21"),
        right.replace("multiply", "find_phone"),
        right + right,
        right + " Done.",
        right.replace("}}", "}").replace("</function>", ""),
        "12 times 30 is 360.",
    ):
        assert not same_call(wrong, of, style)


@pytest.mark.long
def test_training_continues_from_a_checkpoint_on_dialogues(tmp_path):
    """Two small steps from the shipped one, on dialogues alone: the loss begins low and falls."""
    size = "--steps 2 --rows 1 --length 512 --accumulate 1 --no-compiled --corpus-percent 1"
    size += " --log-every 1"
    command = [sys.executable, "-m", "examples.train_tiny.train", "--out", str(tmp_path)]
    options = [*size.split(), "--start", str(SHIPPED), "--tools", "1"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=600)
    log = [json.loads(line) for line in (tmp_path / "continued_log.jsonl").read_text().splitlines()]
    assert log[0]["lm"] < 7 < np.log(VOCAB_SIZE)  # a fresh model begins at the logarithm
    assert len(log) == 2
    for name in ("train_log.jsonl", "train_setup.json"):  # of the run that made the checkpoint
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_size < 20e6
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.encode(MARKS[0]).ids == [VOCAB_SIZE - len(MARKS)]


@pytest.mark.parametrize("mode", ["plain", "thinking", "coder"])
def test_the_shipped_checkpoint_calls_tools(mode):
    """What evaluate.py measured of it, and its card says."""
    measured = json.loads((SHIPPED / "measured.json").read_text())["tools"][mode]
    assert measured["dialogues"] >= 100
    assert measured["called"] >= measured["answered"] >= 0.9
    row = f"| {mode} | {measured['dialogues']} | {measured['called']:.0%} |"
    assert row in (SHIPPED / "README.md").read_text()
