"""What quantised weights of the shipped checkpoint cost: perplexity, and drafts that are kept."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from examples.train_tiny.corpus import documents, split
from examples.train_tiny.evaluate import held_out_windows
from quantised import quantise

WINDOWS, BEGINNING, TOKENS, DRAFTS = 64, 128, 96, 3
# Over bf16: perplexity at most, accepted drafts at least.
BOUNDS = {"int8": (1.003, 0.95), "fp8-blocks": (1.01, 0.95), "int4": (1.005, 0.88)}
Windows = Sequence[tuple[int, ...]]


class Quality(NamedTuple):
    """Of held-out text, and of drafts along greedy text."""

    perplexity: float
    accepted: tuple[float, ...]  # by position, of all steps with drafts

    @classmethod
    def of(
        cls, logprobs: Sequence[Sequence[float]], accepted: Sequence[float], steps: float
    ) -> "Quality":
        """From the log-probabilities of texts, and how many steps kept a draft's first, second …"""
        each = [logprob for text in logprobs for logprob in text]
        kept = tuple(count / steps for count in accepted)
        return cls(math.exp(-sum(each) / len(each)), kept)


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Held-out text."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    _, held_out = split(documents())
    return [tuple(ids) for ids in held_out_windows(tokenizer, held_out, WINDOWS * 512).tolist()]


@pytest.fixture(params=BOUNDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def served_as(kind: str, tmp_path: Path) -> tuple[Path, Mapping[str, str]]:
    """The shipped checkpoint in this format, and the environment to serve it in."""
    folder, env, _ = quantise(SHIPPED, tmp_path, kind)
    return folder, env


def check(kind: str, found: Quality, plain: Quality) -> None:
    """It is as good as BOUNDS say, or better."""
    most, least = BOUNDS[kind]
    assert min(plain.accepted) > 0
    ratio = found.perplexity / plain.perplexity
    for name, each in (("bf16", plain), (kind, found)):
        by_position = " ".join(f"{share:.3f}" for share in each.accepted)
        print(f"{name}: perplexity {each.perplexity:.4f}, drafts kept {by_position}")
    assert ratio <= most
    assert sum(found.accepted) >= least * sum(plain.accepted)
