"""A graph in pieces, as vLLM compiles it on a GPU: all write the residual into one tensor."""

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

LAYERS = 4
PROMPTS = [random_prompt(length) for length in (5, 70)]


def test_pieces_compute_what_the_whole_does(tmp_path, reference):
    """With drafts: the trunk is cut at each linear layer and at attention, the drafter there."""
    folder = write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    engine = Offline(
        folder,
        first="piecewise",
        env={"QWEN3NEXT_DRAFTS": "fixed"},
        enforce_eager=False,
        dtype="float32",
        max_model_len=256,
        compilation_config={"mode": 3, "compile_sizes": []},
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
    )
    try:
        check_greedy(reference(folder), PROMPTS, engine.greedy(PROMPTS, TOKENS, **LOGPROBS))
        graphs, pieces = engine.inside("pieces")
    finally:
        engine.close()
    assert (graphs, pieces) == (2, 2 * LAYERS + 1 + 3)
