"""What quantised weights of the shipped checkpoint cost: perplexity, and drafts that are kept."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from checkpoints import SHIPPED
from engines.quality import BEGINNING, DRAFTS, TOKENS, Quality, Windows, check
from engines.quality import kind as kind
from engines.quality import served_as as served_as
from engines.quality import windows as windows
from engines.vllm.offline import Offline

pytestmark = [pytest.mark.serve, pytest.mark.long]

FLAGS = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": DRAFTS},
}
KEPT = [f"vllm:spec_decode_num_accepted_tokens_per_pos[{i}]" for i in range(DRAFTS)]


@pytest.fixture(scope="module")
def plain(windows) -> Quality:
    return measured(windows, SHIPPED, {})


def measured(windows: Windows, folder: Path, env: Mapping[str, str]) -> Quality:
    engine = Offline(folder, env=dict(env) | {"QWEN3NEXT_DRAFTS": "fixed"}, **FLAGS)
    try:
        read = engine.greedy(list(windows), 1, prompt_logprobs=0)
        before = engine.counters()
        engine.greedy([ids[:BEGINNING] for ids in windows], TOKENS)
        after = engine.counters()
    finally:
        engine.close()
    *kept, steps = (
        after[name] - before.get(name, 0) for name in (*KEPT, "vllm:spec_decode_num_drafts")
    )
    return Quality.of([output.prompt_logprobs for output in read], kept, steps)


def test_perplexity_and_drafts(windows, plain, kind, served_as):
    check(kind, measured(windows, *served_as), plain)
