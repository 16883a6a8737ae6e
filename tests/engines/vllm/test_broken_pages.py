"""A page or a slot that is not a request's own ends the step, and the error says whose it is."""

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(n, seed=9) for n in (5, 70, 30)]
LAYER = "model.layers.1.linear_attn"
FIX = r".* Restart the engine\. .* --no-enable-prefix-caching"


def test_the_error_names_request_layer_and_mend():
    drafts = {"method": "mtp", "num_speculative_tokens": 3}
    engine = Offline(SHIPPED, dtype="float32", max_model_len=512, speculative_config=drafts)
    try:
        page = rf"request broken-1\S*: {LAYER}: row 1: slot \d+ holds start=\d+ end=\d+ .* c=\d+"
        with pytest.raises(AssertionError, match=page + FIX):
            engine.inside("decode_broken", "page", PROMPTS, 1, LAYER)
        slot = r"request broken-2\S*: row 2 has a slot outside \[0, \d+\): 1000000"
        with pytest.raises(AssertionError, match=slot + FIX):
            engine.inside("decode_broken", "slot", PROMPTS, 2, LAYER)
        assert [len(output.token_ids) for output in engine.greedy(PROMPTS, 8)] == [8] * 3
    finally:
        engine.close()
