"""Two tensor-parallel ranks compute what one does."""

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.lora import make_adapter
from engines.process import CPUS
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from family import FAMILY
from reference import Reference

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(len(CPUS) < 2, reason="two ranks need two cores"),
]


# Few tokens: ranks wait for each other busily, which is slow where they share their cores.
PROMPTS = [random_prompt(n, seed=12) for n in (1, 130)]
MODELS = {"qwen3-next": None, "qwen3.5": "dense_HV=3H_wrapped_7-layers"}  # one of FAMILY


@pytest.mark.parametrize("member", MODELS.values(), ids=MODELS)
def test_two_ranks_with_drafts_and_an_adapter(tmp_path, member):
    folder = tmp_path / "model"
    model = FAMILY[member].write(folder) if member else write_checkpoint(folder)
    plain, merged = Reference(model), Reference(model)
    adapter = make_adapter(tmp_path / "adapter", merged)
    engine = Offline(
        model,
        dtype="float32",
        max_model_len=1024,
        tensor_parallel_size=2,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        enable_lora=True,
        language_model_only=True,
    )
    try:
        without = engine.greedy(PROMPTS, 10, **LOGPROBS)
        adapted = engine.greedy(PROMPTS, 4, **LOGPROBS, adapter=str(adapter))
        counters = engine.counters()
    finally:
        engine.close()
    check_greedy(plain, PROMPTS, without)
    check_greedy(merged, PROMPTS, adapted)
    assert counters["vllm:qwen3next_steps"] > 0  # the first rank's, from another process
