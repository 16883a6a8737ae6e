"""What quantised weights of the shipped checkpoint cost: perplexity, and drafts that are kept."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.vllm.offline import Offline
from examples.train_tiny.corpus import documents, split
from examples.train_tiny.evaluate import held_out_windows
from quantised import write_quantised

pytestmark = [pytest.mark.serve, pytest.mark.long]

WINDOWS, BEGINNING, TOKENS = 64, 128, 96
FLAGS = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}
# Over bf16: perplexity at most, accepted drafts at least. int4 is rounded to nearest, without
# calibration.
BOUNDS = {"int8": (1.003, 0.95), "fp8": (1.01, 0.95), "int4": (1.02, 0.88)}


class Quality(NamedTuple):
    perplexity: float
    accepted: float  # of three drafts a step, along greedy text


@pytest.fixture(scope="module")
def windows() -> Sequence[tuple[int, ...]]:
    """Held-out text."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    _, held_out = split(documents())
    return [tuple(ids) for ids in held_out_windows(tokenizer, held_out, WINDOWS * 512).tolist()]


@pytest.fixture(scope="module")
def plain(windows) -> Quality:
    return measured(windows, SHIPPED)


def measured(
    windows: Sequence[tuple[int, ...]], folder: Path, env: dict[str, str] | None = None
) -> Quality:
    engine = Offline(folder, env=(env or {}) | {"QWEN3NEXT_DRAFTS": "fixed"}, **FLAGS)
    try:
        read = engine.greedy(list(windows), 1, prompt_logprobs=0)
        before = engine.counters()
        engine.greedy([ids[:BEGINNING] for ids in windows], TOKENS)
        after = engine.counters()
    finally:
        engine.close()
    logprobs = [logprob for output in read for logprob in output.prompt_logprobs]
    drafted, accepted = (
        after[name] - before.get(name, 0)
        for name in (f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted"))
    )
    return Quality(math.exp(-sum(logprobs) / len(logprobs)), accepted / drafted)


@pytest.mark.parametrize("name", BOUNDS)
def test_perplexity_and_drafts(windows, plain, tmp_path, name):
    if name == "fp8":
        found = measured(windows, write_quantised(SHIPPED, tmp_path, "fp8-blocks")[0])
    else:
        found = measured(windows, SHIPPED, {"QWEN3NEXT_QUANTISE": name})
    ratio = found.perplexity / plain.perplexity
    print(f"{name}: perplexity {ratio:.4f} of {plain.perplexity:.2f}, drafts {found.accepted:.3f}")
    most, least = BOUNDS[name]
    assert ratio <= most
    assert found.accepted >= least * plain.accepted
