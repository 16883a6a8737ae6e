"""A tokenizer beside the model that it is for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3next_plugin.config.errors import ConfigError
from qwen3next_plugin.config.json_files import read_object

TOKENIZER = "tokenizer.json"
MOST_VALUES = 3_000_000  # the largest known, of 250,000 tokens and their merges, has a third


def check_tokenizer(folder: Path, vocab_size: int, flag: str) -> None:
    """Refuse a local tokenizer with tokens that the model's embedding lacks.

    A client's text that has one of them would end an engine.

    Raises:
        ConfigError: names the file, both numbers and the fix.
    """
    file = folder / TOKENIZER
    if not file.is_file():
        return
    last = max(_ids(read_object(file, ConfigError, MOST_VALUES)), default=0)
    if last >= vocab_size:
        raise ConfigError(
            f"{file} has {last + 1} tokens, but the model's embedding (vocab_size) has "
            f"{vocab_size}; fetch the model's own tokenizer, or name it with {flag}"
        )


def _ids(raw: dict[str, Any]) -> Iterator[int]:
    model, added = raw.get("model"), raw.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from (number for number in vocab.values() if isinstance(number, int))
    elif isinstance(vocab, list):
        yield len(vocab) - 1
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token["id"]
