"""The clients that MTP is measured with: models, prompts, and lengths of answers."""

import argparse
import difflib
import itertools
import json
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.block_model import CONFIG, LAYERS, TINY, block_model
from benchmarks.chain_model import chain_model, known
from benchmarks.mtp.load import Request, staggered
from benchmarks.report import Run


class Name(Enum):
    """Cases, in the order of records and tables."""

    CHECKPOINT = "checkpoint"
    LONG = "long"
    PROMPTS = "prompts"
    FIRST_TOKEN = "first-token"
    REJECTED = "rejected"


class Model(Enum):
    """What the servers of a case serve: the shipped checkpoint, or the chain model."""

    TINY = "tiny"
    CHAIN = "chain"
    REJECTED = "rejected"  # no draft is accepted


@dataclass(frozen=True, slots=True)
class Case:
    """Closed-loop clients of one kind. Lengths are from the shortest to the longest."""

    model: Model
    prompt: tuple[int, int]  # characters of the shipped checkpoint, else tokens
    answer: tuple[int, int]  # tokens
    clients: dict[int, float]  # number of clients → seconds of each of their turns, at least
    title: str

    @property
    def whole(self) -> bool:
        """Whether a turn with one client is of whole answers, because prompts weigh much."""
        return self.answer[0] < self.answer[1]

    def requests(self, config: dict[str, Any], clients: int, seed: str) -> Iterator[Request]:
        """Endless requests, all different; the same for the same seed."""
        chance = random.Random(seed)
        prompts = self.texts(chance) if self.model is Model.TINY else self.chains(config, chance)
        found = itertools.starmap(Request, zip(prompts, self.lengths(chance), strict=False))
        return found if self.whole else staggered(found, clients)

    def lengths(self, chance: random.Random) -> Iterator[int]:
        """Lengths of answers, in pairs that add up to the same, so that turns are alike."""
        while True:
            first = chance.randint(*self.answer)
            yield from (first, sum(self.answer) - first)

    def texts(self, chance: random.Random) -> Iterator[str]:
        """Pieces of Python source."""
        source = "".join(Path(m.__file__).read_text() for m in (argparse, difflib, textwrap))
        while True:
            length = chance.randint(*self.prompt)
            begin = chance.randrange(len(source) - length)
            yield source[begin : begin + length]

    def chains(self, config: dict[str, Any], chance: random.Random) -> Iterator[list[int]]:
        """Random tokens that the chain model knows."""
        while True:
            yield chance.choices(range(known(config)), k=chance.randint(*self.prompt))


# A turn is long enough for over 200 steps of the shipped checkpoint, some 100 of the block model:
# draft lengths settle within 100 steps. One client's ratios scatter most, so its turns have more.
CASES = {
    Name.CHECKPOINT: Case(
        Model.TINY, (200, 1600), (16, 160), {1: 6, 4: 4, 16: 8, 48: 12},
        "shipped checkpoint",
    ),
    Name.LONG: Case(
        Model.CHAIN, (64, 64), (256, 256), {1: 12, 8: 9},
        "long answers",
    ),
    Name.PROMPTS: Case(
        Model.CHAIN, (1000, 1000), (16, 160), {8: 12},
        "long prompts",
    ),
    Name.FIRST_TOKEN: Case(
        Model.CHAIN, (4000, 4000), (16, 16), {1: 0},
        "first token",
    ),
    Name.REJECTED: Case(
        Model.REJECTED, (64, 64), (256, 256), {1: 6, 8: 9},
        "long answers, rejected",
    ),
}  # fmt: skip


def load_model(run: Run, model: Model) -> tuple[Path, dict[str, Any]]:
    """The folder of a model, written if it is not there, and its config."""
    if model is Model.TINY:
        return TINY, json.loads((TINY / "config.json").read_text())
    layers = block_model(run.out / "block-model") / LAYERS
    folder = run.out / "chain-model"
    return chain_model(folder, layers, CONFIG, rejected=model is Model.REJECTED), CONFIG
