"""The GPU's path through the engine, on a CPU: Triton's interpreter in place of a GPU.

Greedy text and log-probabilities are transformers' own, with drafts and without, through chunks of
a prompt, cached prefixes and mixed batches.
"""

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.vllm.offline import Offline
from reference import Reference

pytestmark = pytest.mark.serve

ON_DEVICE = {"QWEN3NEXT_KERNELS": "triton", "QWEN3NEXT_DRAFTS": "fixed"}
SMALL = {"dtype": "float32", "max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 4}
DRAFTS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
TOKENS = 5
# The interpreter is slow, and runs a program for each head.
HEADS = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    "drafts",
    [pytest.param({}, marks=pytest.mark.long, id="plain"), pytest.param(DRAFTS, id="mtp-2")],
)
def test_as_transformers(tmp_path, drafts, size):
    layers = size(2, 4)  # the last of them with attention
    shape = HEADS | {"num_hidden_layers": layers, "full_attention_interval": layers}
    checkpoint = write_checkpoint(tmp_path, **shape)
    reference = Reference(checkpoint)
    prompts = [random_prompt(n, seed=12) for n in size((3, 12, 40), (3, 21, 70))]
    engine = Offline(checkpoint, env=ON_DEVICE, first="on_device", **SMALL, **drafts)
    try:
        check_greedy(reference, prompts, engine.greedy(prompts, TOKENS, logprobs=0))
        loaded = engine.inside("backends")
        assert {("gated_delta_net", "triton"), ("qk_norm_rope", "triton")} <= loaded
        assert ("vllm:spec_decode_num_drafts" in engine.counters()) == bool(drafts)
    finally:
        engine.close()
