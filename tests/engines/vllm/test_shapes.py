"""Odd shapes, each served once with MTP: what a kernel or a loader may have taken for granted."""

import pytest

from checkpoints import SHAPES, random_prompt, write_checkpoint
from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS, check_cache_hits
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve


@pytest.mark.parametrize(("shape", "num_drafts"), zip(SHAPES, (1, 2, 3, 8), strict=True))
def test_served_as_transformers_computes_it(tmp_path, reference, shape, num_drafts):
    checkpoint = write_checkpoint(tmp_path, seed=num_drafts, **SHAPES[shape])
    drafts = {"method": "qwen3_next_mtp", "num_speculative_tokens": num_drafts}
    flags = {"dtype": "float32", "max_model_len": 2048, "speculative_config": drafts}
    engine = Offline(checkpoint, env={"QWEN3NEXT_DRAFTS": "fixed"}, **flags)
    try:
        prompts = [random_prompt(n, seed=8) for n in (1, 65, 300)]
        outputs = engine.greedy(prompts, TOKENS, **LOGPROBS)
        block = engine.cache()["block_size"]
        long = [random_prompt(2 * block + 10, seed=9)]
        warm = check_cache_hits(engine, long)
        assert engine.counters()["vllm:spec_decode_num_draft_tokens"] > TOKENS * num_drafts
    finally:
        engine.close()
    check_greedy(reference(checkpoint), prompts + long, outputs + warm)
