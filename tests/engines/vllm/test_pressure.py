"""Too little memory for all requests: vLLM preempts and resumes them, and no token changes."""

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(n, seed=5) for n in (100, 120, 126, 127, 250, 255, 256, 257)]
TOKENS = 160


@pytest.mark.parametrize("k", [0, 2], ids=["plain", "mtp-2"])
def test_preempted_requests_end_as_undisturbed_ones(checkpoint, reference, k):
    flags = {"dtype": "float32", "max_model_len": 512, "num_gpu_blocks_override": 40}
    if k:  # and hits on parts of a block, where a request resumes
        flags["speculative_config"] = {"method": "mtp", "num_speculative_tokens": k}
        flags["prefix_match_unit"] = 16
    engine = Offline(checkpoint, **flags)
    try:
        outputs = engine.greedy(PROMPTS, TOKENS, logprobs=0)
        counters = engine.counters()
        assert counters["vllm:num_preemptions"] > 0
        if k:
            assert counters["vllm:qwen3next_steps"] > 0
            assert counters["vllm:qwen3next_state_pages"] == 0
    finally:
        engine.close()
    check_greedy(reference(checkpoint), PROMPTS, outputs)
