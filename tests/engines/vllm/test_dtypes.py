"""Served in bf16 or fp16 it is no farther from fp32 than transformers in that dtype is."""

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_distance
from engines.vllm.offline import Offline
from qwen3next_plugin.mtp.draft_head import DRAFTED

pytestmark = pytest.mark.serve

# Of 1,500 tokens the distances' medians still differ by a tenth, by which experts are nearly equal.
PROMPTS = [random_prompt(n, seed=seed) for seed in (10, 11, 12) for n in (7, 65, 400, 1000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_farther_from_fp32_than_transformers(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    # More tokens than a draft chooses from, as released models have.
    checkpoint = write_checkpoint(tmp_path, dtype=dtype, vocab_size=DRAFTED + 500)
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    engine = Offline(checkpoint, dtype=name, max_model_len=2048, speculative_config=drafts)
    try:
        outputs = engine.greedy(PROMPTS, 16, prompt_logprobs=0)
    finally:
        engine.close()
    check_distance(checkpoint, dtype, PROMPTS, [output.prompt_logprobs for output in outputs])
    assert all(len(output.token_ids) == 16 for output in outputs)
