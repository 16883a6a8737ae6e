"""Checkpoints whose bits are compared among the engines."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from checkpoints import SHAPES, SHIPPED, random_prompt, write_checkpoint
from engines.bits import prompts as texts
from family import FAMILY
from tiers import long_except

Ids = tuple[int, ...]
TOKENS = 24
LENGTHS = (1, 2, 9, 64, 65, 129, 300)
# Experts, dense layers, tied embeddings, biases, YaRN; Qwen3.5's layout.
CHECKPOINTS = ("shipped", *SHAPES, *FAMILY)


class Served(NamedTuple):
    """A checkpoint, and prompts that it has something to say about."""

    folder: Path
    prompts: Sequence[Ids]
    wrapped: bool = False  # served without its vision tower


@pytest.fixture(scope="module", params=long_except(["shipped"], CHECKPOINTS))
def served(request, tmp_path_factory, size) -> Served:
    if request.param == "shipped":
        return Served(SHIPPED, texts(many=False)[:: size(2, 1)])
    folder = tmp_path_factory.mktemp("checkpoint")
    prompts = [random_prompt(length) for length in LENGTHS]
    if member := FAMILY.get(request.param):
        return Served(member.write(folder), prompts, member.wrapped)
    return Served(write_checkpoint(folder, **SHAPES[request.param]), prompts)
