"""Too little memory for all requests: vLLM preempts and resumes them, and no token changes."""

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.vllm.offline import Offline
from family import FAMILY

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(n, seed=5) for n in (100, 120, 126, 127, 250, 255, 256, 257)]
TOKENS = 160


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory):
    return FAMILY["dense_HV=3H_wrapped_7-layers"].write(tmp_path_factory.mktemp("qwen3.5"))


@pytest.mark.parametrize(
    ("model", "num_drafts", "blocks"),
    [
        pytest.param("checkpoint", 0, 40, id="plain"),
        pytest.param("checkpoint", 2, 40, id="mtp-2", marks=pytest.mark.long),
        pytest.param("qwen3_5", 2, 40, id="qwen3.5-mtp-2"),
    ],
)
def test_preempted_requests_end_as_undisturbed_ones(request, reference, model, num_drafts, blocks):
    model = request.getfixturevalue(model)
    flags = {"dtype": "float32", "max_model_len": 512, "num_gpu_blocks_override": blocks}
    flags["language_model_only"] = True
    if num_drafts:  # and hits on parts of a block, where a request resumes
        flags["speculative_config"] = {"method": "mtp", "num_speculative_tokens": num_drafts}
        flags["prefix_match_unit"] = 16
    engine = Offline(model, **flags)
    try:
        outputs = engine.greedy(PROMPTS, TOKENS, logprobs=0)
        counters = engine.counters()
        assert counters["vllm:num_preemptions"] > 0
        if num_drafts:
            assert counters["vllm:qwen3next_steps"] > 0
            assert counters["vllm:qwen3next_state_pages"] == 0
    finally:
        engine.close()
    check_greedy(reference(model), PROMPTS, outputs)
