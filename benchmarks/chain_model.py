"""A model whose text is known and whose drafts are right four times in five, by construction.

It costs what the block model costs: its layers are the block model's, random and computed in full.
Three tensors are made instead:

- Embedding: rows with a standard deviation of 1 instead of 0.02. After all layers the residual
  stream is still mostly the row of the last token.
- Output head: the row of a token's successor is 0.02 times that token's embedding. So the likeliest
  next token is the successor, by a wide margin. The successors of the first tokens (`known`) form
  one cycle through all of them, in random order. An answer follows from its prompt's last token.
- `mtp.fc`: passes on the next token's embedding, plus a random product of the hidden state. So the
  MTP layer drafts the successor, too, except after a marked token, which is a random fifth of them:
  marked tokens have MARK in coordinate 0 of their embedding, all others 0, and `mtp.fc` maps that
  coordinate to the embedding of one token, so long that the draft is that token's successor.

So a draft is accepted with a chance of 0.8 at each position, given those before it. On real text
chances are alike for some time (code, names), here they are independent: harder to adapt to. All
`known` tokens are in the draft head's vocabulary.

The other model, `rejected`, has a random `mtp.fc`: hardly a draft is accepted.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.block_model import (
    OWN,
    finish,
    random_tensors,
    tensors,
    write_layers,
    written,
)

ACCEPTED = 0.8
HEAD_STD = 0.02
MARK = 4.0  # in coordinate 0 of a marked token
PASSED = 2.0  # times the embedding that mtp.fc passes on
STRAY = 8.0  # times as long: what it makes of a mark, compared with the embedding
EMBEDDING, HEAD, FC = OWN


def known(config: Mapping[str, Any]) -> int:
    """How many tokens are in the cycle, from 0."""
    return min(8192, config["vocab_size"] // 2)


def successors(config: Mapping[str, Any]) -> torch.Tensor:
    """The token after each known one [known]."""
    n = known(config)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return torch.empty(n, dtype=torch.int64).scatter_(0, order, order.roll(-1))


def marked(config: Mapping[str, Any]) -> torch.Tensor:
    """The known tokens after which drafts are wrong, in ascending order."""
    n = known(config)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    return chosen[: round(n * (1 - ACCEPTED))].sort().values


def answer_of(config: Mapping[str, Any], prompt: Sequence[int], tokens: int) -> list[str]:
    """The words of the answer to a prompt: the numbers of its tokens."""
    after, token, words = successors(config).tolist(), prompt[-1], []
    for _ in range(tokens):
        token = after[token]
        words.append(str(token))
    return words


def chain_model(folder: Path, layers: Path, config: dict[str, Any], *, rejected: bool) -> Path:
    """Write a model below `folder` unless it is there; `layers` is the block model's file."""
    config = config | {"eos_token_id": config["vocab_size"] - 1}  # no known token
    model = folder / ("rejected" if rejected else "accepted")
    if written(model, config):
        return model
    model.mkdir(parents=True, exist_ok=True)
    write_layers(layers, config)
    vocabulary = folder / "vocabulary.safetensors"
    if not vocabulary.exists():
        save_file(made_vocabulary(config), vocabulary)
    for shared in (layers, vocabulary):
        (model / shared.name).unlink(missing_ok=True)
        (model / shared.name).symlink_to(shared.resolve())
    fc = made_fc(config, embedding_of(vocabulary), rejected=rejected)
    save_file({FC: fc}, model / "fc.safetensors")
    write_tokenizer(model, config["vocab_size"])
    finish(model, config)
    return model


def made_vocabulary(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Embedding and output head."""
    made = random_tensors(tensors(config), (EMBEDDING, HEAD))
    embedding, head = made[EMBEDDING], made[HEAD]
    embedding.div_(HEAD_STD)
    embedding[:, 0] = 0
    embedding[marked(config), 0] = MARK
    head[successors(config)] = embedding[: known(config)] * HEAD_STD
    return made


def embedding_of(path: Path) -> torch.Tensor:
    """The first rows of the embedding in a file [.., D]."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(EMBEDDING)[:64]


def made_fc(config: Mapping[str, Any], embedding: torch.Tensor, *, rejected: bool) -> torch.Tensor:
    """mtp.fc [D, 2·D]: for the normalised embedding, then for the normalised hidden state."""
    fc, D = random_tensors(tensors(config), (FC,))[FC], config["hidden_size"]
    if not rejected:
        fc[:, :D] = passing(embedding)
    return fc


def passing(embedding: torch.Tensor) -> torch.Tensor:
    """What passes a normalised embedding on, and a mark as a stray one [D, D]."""
    passed = torch.eye(embedding.shape[1]) * PASSED
    unmarked = embedding[embedding[:, 0] == 0][0]
    passed[:, 0] = unmarked * PASSED * STRAY / MARK
    return passed


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose tokens are their numbers, so that equal texts are equal tokens."""
    words = {f"Ġ{i}": i for i in range(vocabulary)}  # Ġ is a space before a word
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="Ġ0"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
