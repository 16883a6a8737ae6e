"""Prompts and weights for which a token must have the same bits, whatever it is computed with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from checkpoints import SHIPPED
from engines.traffic import source_tokens
from quantised import AT_LOAD, quantise
from tiers import long_except

INVARIANT = {"QWEN3NEXT_BATCH_INVARIANT": "1"}
LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 129, 200, 255, 300, 511, 700)
MORE = 84  # prompts with --long
# Of the weights: as shipped, quantised at load, or in the checkpoint; the others with --long.
IN_FILES = ("fp8-blocks", "gptq", "awq", "packed_4-bit", "int8-rows")
FORMATS = long_except(["bf16"], ["bf16", *AT_LOAD, *IN_FILES])


def prompts(*, many: bool, longest: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Texts of LENGTHS, and of `longest`; `many`: of MORE lengths besides."""
    lengths = [*LENGTHS, *longest, *((37 * i) % 331 + 1 for i in range(MORE if many else 0))]
    ids = source_tokens()
    return [tuple(ids[(37 * i) % 1500 :][:length]) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module", params=FORMATS)
def served_in(request, tmp_path_factory) -> tuple[Path, Mapping[str, str]]:
    """The shipped checkpoint, and the environment to serve it in, of each format in turn."""
    if request.param == "bf16":
        return SHIPPED, INVARIANT
    folder, env, _ = quantise(SHIPPED, tmp_path_factory.mktemp("quantised"), request.param)
    return folder, INVARIANT | env
