"""From documents and dialogues to micro-batches of token windows.

A token that is read but not learnt, such as a question to the assistant, is stored as ~id.
"""

import re
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer

from .corpus import IM_END, IM_START, Document

LONG_EVERY = 8  # one micro-batch in eight holds a single long window instead of several short ones
ASSISTANT = re.compile(
    rf"({re.escape(IM_START)}assistant\n(?:<think>\n)?)(.*?{re.escape(IM_END)})", re.DOTALL
)
LOOK_AHEAD = 4  # the trunk needs one token after those it reads, MTP at depth 3 three more


def encode(tokenizer: Tokenizer, docs: list[Document]) -> list[np.ndarray]:
    """Token ids of each document."""
    encoded = tokenizer.encode_batch_fast([d.text for d in docs], add_special_tokens=False)
    return [np.array(e.ids, dtype=np.int64) for e in encoded]


def windows(
    docs: list[np.ndarray], rows: int, length: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Endless micro-batches of rows*length tokens; windows are cut from shuffled documents."""
    size = rows * length
    while True:
        stream = np.concatenate([docs[i] for i in rng.permutation(len(docs))])
        starts = rng.permutation((len(stream) - LOOK_AHEAD) // length) * length
        for n in range(0, len(starts) - rows + 1, rows):
            if n // rows % LONG_EVERY == LONG_EVERY - 1:
                start = rng.integers(len(stream) - size - LOOK_AHEAD)
                yield torch.from_numpy(stream[None, start : start + size + LOOK_AHEAD])
                continue
            rows_at = starts[n : n + rows, None] + np.arange(length + LOOK_AHEAD)
            yield torch.from_numpy(stream[rows_at])


def encode_dialogue(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of one dialogue; only what the assistant writes is learnt.

    `<think>` after the role is part of the prompt: whoever asks decides whether to think.
    """
    read, parts = ASSISTANT.split(text), []
    for n, piece in enumerate(read):
        ids = np.array(tokenizer.encode(piece, add_special_tokens=False).ids, dtype=np.int64)
        parts.append(ids if n % 3 == 2 else ~ids)
    return np.concatenate(parts)


def dialogue_windows(
    tokenizer: Tokenizer, dialogues: Iterator[str], length: int
) -> Iterator[torch.Tensor]:
    """Endless micro-batches [1, length+LOOK_AHEAD]; each begins with the start of a dialogue."""
    while True:
        parts, size = [], 0
        while size < length + LOOK_AHEAD:
            parts.append(encode_dialogue(tokenizer, next(dialogues)))
            size += len(parts[-1])
        yield torch.from_numpy(np.concatenate(parts)[None, : length + LOOK_AHEAD])


def mixed(
    first: Iterator[torch.Tensor],
    second: Iterator[torch.Tensor],
    share: float,
    rng: np.random.Generator,
) -> Iterator[torch.Tensor]:
    """Micro-batches of both in random order, `share` of them of the second."""
    while True:
        yield next(second if rng.random() < share else first)
