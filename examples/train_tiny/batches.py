"""From documents to micro-batches of token windows."""

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer

from .corpus import Document

LONG_EVERY = 8  # one micro-batch in eight holds a single long window instead of several short ones
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
