"""The tokenizer: a byte-level BPE of 4,096 entries with Qwen's pre-tokenisation and ChatML."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .corpus import END_OF_TEXT, IM_END, IM_START

VOCAB_SIZE = 4096
SPECIALS = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
CHAT_TEMPLATE, CODER_TEMPLATE = (
    Path(__file__).with_name(f"{name}_template.jinja").read_text() for name in ("chat", "coder")
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_marks(tokenizer)


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """The marks of thinking and tool calls as tokens, in place of the last entries learnt."""
    data = json.loads(tokenizer.to_str())
    if any(token["content"] == MARKS[0] for token in data["added_tokens"]):
        return tokenizer
    kept = VOCAB_SIZE - len(MARKS)
    data["model"]["merges"] = data["model"]["merges"][: -len(MARKS)]
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if i < kept}
    plain = data["added_tokens"][0] | {"special": False}  # part of the text, as in Qwen's tokenizer
    data["added_tokens"] += [plain | {"id": kept + i, "content": m} for i, m in enumerate(MARKS)]
    return Tokenizer.from_str(json.dumps(data))


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json, its config and the chat template as Hugging Face reads them."""
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (out / "coder_template.jinja").write_text(CODER_TEMPLATE)  # for a server's --chat-template
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
