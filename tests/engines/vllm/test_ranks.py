"""Two tensor-parallel ranks compute what one does."""

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.process import CPUS
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(len(CPUS) < 2, reason="two ranks need two cores"),
]


def test_two_ranks_with_drafts(checkpoint, reference):
    """Few tokens: ranks wait for each other busily, which is slow where they share their cores."""
    engine = Offline(
        checkpoint,
        dtype="float32",
        max_model_len=1024,
        tensor_parallel_size=2,
        speculative_config={"method": "qwen3_next_mtp", "num_speculative_tokens": 2},
    )
    try:
        prompts = [random_prompt(n, seed=12) for n in (1, 65, 300)]
        outputs = engine.greedy(prompts, 12, **LOGPROBS)
        counters = engine.counters()
    finally:
        engine.close()
    check_greedy(reference(checkpoint), prompts, outputs)
    assert counters["vllm:qwen3next_steps"] > 0  # the first rank's, from another process
