"""SGLang's log says so if MTP weights are broken, though adaptive lengths soon draft nothing."""

import pytest

from checkpoints import SHIPPED, random_prompt, write_scrambled
from engines.figures import drafts
from engines.sglang.server import NEXTN, Forked
from qwen3next_plugin.mtp.metrics import ESTIMATES_EVERY

pytestmark = pytest.mark.serve

# Hard for the shipped checkpoint too: no text at all.
PROMPTS = [random_prompt(1 + i % 5, seed=i) for i in range(192)]
FLAGS = (
    "--dtype", "float32", "--max-total-tokens", "8192", "--max-running-requests", "192",
    "--max-mamba-cache-size", "200", "--enable-metrics", *NEXTN, "3",
)  # fmt: skip
# As many prompts in a step as fit, so that most draft before the policy knows better.
AT_ONCE = {"QWEN3NEXT_STEP_SECONDS": "0"}


@pytest.mark.parametrize("weights", ["scrambled", "healthy"])
def test_broken_weights_are_reported(tmp_path, weights):
    model = write_scrambled(tmp_path / "model") if weights == "scrambled" else SHIPPED
    server = Forked(model, *FLAGS, env=AT_ONCE).wait()
    try:
        steps = sum(one.steps for _ in range(2) for one in server.greedy(PROMPTS, 6))
        server.greedy(PROMPTS[:1], 2 * ESTIMATES_EVERY)
        counts = drafts(server, "sglang")
        estimate = server.by_label("sglang:qwen3next_acceptance", "position")["1"]
        log = server.process.text().splitlines()
    finally:
        server.close()
    assert steps >= 150
    share = counts["accepted"]["1"] / counts["verified"]["1"]
    assert (share > 0.1) == (weights == "healthy")
    assert estimate == pytest.approx(share, abs=0.1)  # assumed at first: 0.8
    said = [line for line in log if "drafts were accepted" in line]
    assert len(said) == (weights == "scrambled")
    assert all("mtp.* weights are lost" in line for line in said)
