"""Checkpoints whose bits are compared among the engines."""

from collections.abc import Sequence
from pathlib import Path

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
DENSE = "HV=4H_dense-layers_top-3-of-12"


@pytest.fixture(scope="module", params=long_except(["shipped", DENSE], CHECKPOINTS))
def served(request, tmp_path_factory) -> tuple[Path, Sequence[Ids]]:
    """A checkpoint, and prompts that it has something to say about."""
    if request.param == "shipped":
        return SHIPPED, texts(many=False)
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param in FAMILY:
        folder = FAMILY[request.param].write(folder)
    else:
        write_checkpoint(folder, **SHAPES[request.param])
    return folder, [random_prompt(length) for length in LENGTHS]
