"""Served in bf16 or fp16 it is no farther from fp32 than transformers in that dtype is.

Quantised checkpoints than transformers with the dequantised weights.
"""

from pathlib import Path

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.checks import SERVED_IN_BF16, check_distance
from engines.vllm.offline import Offline
from quantised import quantise
from qwen3next_plugin.mtp.draft_head import DRAFTED
from tiers import long_except

pytestmark = pytest.mark.serve

# Of 1,500 tokens the distances' medians still differ by a tenth, by which experts are nearly equal.
PROMPTS = [random_prompt(n, seed=seed) for seed in (10, 11, 12) for n in (7, 65, 400, 1000)]


@pytest.mark.parametrize(
    "dtype", long_except([torch.bfloat16], [torch.bfloat16, torch.float16]), ids=str
)
def test_no_farther_from_fp32_than_transformers(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    # More tokens than a draft chooses from, as released models have.
    checkpoint = write_checkpoint(tmp_path, dtype=dtype, vocab_size=DRAFTED + 500)
    check_distance(checkpoint, dtype, PROMPTS, prompt_logprobs(checkpoint, name, {}))


@pytest.mark.long
@pytest.mark.parametrize("kind", SERVED_IN_BF16)
def test_quantised_no_farther_from_fp32_than_transformers(tmp_path, kind):
    plain = write_checkpoint(tmp_path / "plain", dtype=torch.bfloat16, hidden_size=160)
    folder, env, twin = quantise(plain, tmp_path, kind)
    check_distance(twin, torch.bfloat16, PROMPTS, prompt_logprobs(folder, "bfloat16", env))


def prompt_logprobs(folder: Path, dtype: str, env: dict[str, str]) -> list[tuple[float, ...]]:
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    engine = Offline(folder, env=env, dtype=dtype, max_model_len=2048, speculative_config=drafts)
    try:
        outputs = engine.greedy(PROMPTS, 16, prompt_logprobs=0)
    finally:
        engine.close()
    assert all(len(output.token_ids) == 16 for output in outputs)
    return [output.prompt_logprobs for output in outputs]
