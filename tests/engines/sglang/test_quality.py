"""What quantised weights of the shipped checkpoint cost: perplexity, and drafts that are kept."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from checkpoints import SHIPPED
from engines.quality import BEGINNING, DRAFTS, TOKENS, Quality, Windows, check
from engines.quality import kind as kind
from engines.quality import served_as as served_as
from engines.quality import windows as windows
from engines.sglang.server import FIXED, NEXTN, Forked

pytestmark = [pytest.mark.serve, pytest.mark.long]

FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "16384", *NEXTN, str(DRAFTS))
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}


@pytest.fixture(scope="module")
def plain(windows) -> Quality:
    return measured(windows, SHIPPED, {})


def measured(windows: Windows, folder: Path, env: Mapping[str, str]) -> Quality:
    server = Forked(folder, *FLAGS, env=FIXED | env).wait()
    try:
        read = server.greedy(windows, 1, **LOGPROBS)
        written = server.greedy([ids[:BEGINNING] for ids in windows], TOKENS)
    finally:
        server.close()
    kept = [sum(sum(answer.kept[i + 1 :]) for answer in written) for i in range(DRAFTS)]
    steps = sum(answer.steps for answer in written)
    return Quality.of([answer.prompt_logprobs for answer in read], kept, steps)


def test_perplexity_and_drafts(windows, plain, kind, served_as):
    check(kind, measured(windows, *served_as), plain)
