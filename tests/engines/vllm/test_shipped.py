"""The shipped checkpoint, served with MTP, computes what transformers computes on real text."""

import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.checks import LENGTHS, TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

DRAFTS = {"method": "mtp", "num_speculative_tokens": 3}


def test_parity_on_the_standard_librarys_source(reference):
    """Each length alone and all in one batch; three drafts a step, half of them right."""
    source = Path(textwrap.__file__).read_text() * 2
    ids = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(source).ids
    assert len(ids) > max(LENGTHS)
    prompts = [tuple(ids[:length]) for length in LENGTHS]
    flags = {"dtype": "float32", "max_model_len": 8192, "speculative_config": DRAFTS}
    engine = Offline(SHIPPED, env={"QWEN3NEXT_DRAFTS": "fixed"}, **flags)
    try:
        together = engine.greedy(prompts, TOKENS, **LOGPROBS)
        alone = [engine.greedy([prompt], TOKENS)[0] for prompt in prompts]
        counters = engine.counters()
    finally:
        engine.close()
    check_greedy(reference(SHIPPED), prompts, together)
    check_greedy(reference(SHIPPED), prompts, alone)
    drafted, accepted = (
        counters[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted")
    )
    assert accepted > 0.4 * drafted  # 315 of 614 were
