"""Served in bf16 or fp16 it is no farther from fp32 than transformers in that dtype is."""

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.vllm.offline import Offline
from reference import Reference

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(n, seed=10) for n in (7, 65, 400, 1000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_farther_from_fp32_than_transformers(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    checkpoint = write_checkpoint(tmp_path, dtype=dtype)
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    engine = Offline(checkpoint, dtype=name, max_model_len=2048, speculative_config=drafts)
    try:
        outputs = engine.greedy(PROMPTS, 16, prompt_logprobs=0)
    finally:
        engine.close()
    exact, theirs = Reference(checkpoint), Reference(checkpoint, dtype)

    def distances(logprobs) -> torch.Tensor:
        """|Δ| to fp32, of every token of all prompts."""
        return torch.cat(
            [
                (torch.as_tensor(found) - exact.prompt_logprobs(prompt)).abs()
                for prompt, found in zip(PROMPTS, logprobs, strict=True)
            ]
        )

    ours = distances([output.prompt_logprobs for output in outputs])
    other = distances([theirs.prompt_logprobs(prompt) for prompt in PROMPTS])
    # A router that picks another expert makes a few tokens differ much, now here and now there:
    # the mean is compared token by token against its own spread, the median plainly.
    excess = ours - other
    assert excess.mean() <= 3 * excess.std() / len(excess) ** 0.5
    assert ours.median() <= 1.05 * other.median()
    assert all(len(output.token_ids) == 16 for output in outputs)
