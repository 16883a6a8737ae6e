"""vLLM's log says so if MTP weights are broken, though adaptive lengths soon draft nothing."""

import pytest

from checkpoints import SHIPPED, random_prompt, write_scrambled
from engines.vllm.offline import Offline
from qwen3next_plugin.mtp.metrics import ESTIMATES_EVERY

pytestmark = pytest.mark.serve

# Hard for the shipped checkpoint too: no text at all.
PROMPTS = [random_prompt(1 + i % 5, seed=i) for i in range(192)]
FLAGS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": len(PROMPTS),
    "max_num_batched_tokens": 1024,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}
# All prompts in one step, so that all draft before the policy knows better.
AT_ONCE = {"QWEN3NEXT_STEP_SECONDS": "0"}


@pytest.mark.parametrize("weights", ["scrambled", pytest.param("healthy", marks=pytest.mark.long)])
def test_broken_weights_are_reported(tmp_path, weights):
    model = write_scrambled(tmp_path / "model") if weights == "scrambled" else SHIPPED
    engine = Offline(model, env=AT_ONCE, **FLAGS)
    try:
        for _ in range(2):
            engine.greedy(PROMPTS, 6)
        engine.greedy(PROMPTS[:1], 2 * ESTIMATES_EVERY)
        verified = engine.inside("board", "drafts_verified")["1"]
        accepted = engine.inside("board", "drafts_accepted")["1"]
        estimate = engine.inside("board", "acceptance")["1"]
        log = engine.process.text().splitlines()
    finally:
        engine.close()
    assert verified >= 150
    assert (accepted > 0.1 * verified) == (weights == "healthy")
    assert estimate == pytest.approx(accepted / verified, abs=0.1)  # assumed at first: 0.8
    said = [line for line in log if "drafts were accepted" in line]
    assert len(said) == (weights == "scrambled")
    assert all("ERROR" in line and "mtp.* weights are lost" in line for line in said)
