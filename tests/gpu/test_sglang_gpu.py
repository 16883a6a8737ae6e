"""On real GPUs: SGLang with the plugin serves the shipped checkpoint as fp32 on the CPU does."""

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.checks import check_greedy
from engines.sglang.server import NEXTN, Server
from reference import Reference

pytest.importorskip("sglang")
pytestmark = pytest.mark.serve

NO_GRAPHS = ("--disable-prefill-cuda-graph", "--disable-decode-cuda-graph")
# Pages are kept at short intervals, so that answers reach several.
SMALL = ("--dtype", "float32", "--context-length", "1024", "--mamba-track-interval", "64")


@pytest.mark.parametrize("graphs", [NO_GRAPHS, ()], ids=["eager", "graphs"])
@pytest.mark.parametrize("drafts", [(), (*NEXTN, "3")], ids=["plain", "nextn-3"])
def test_greedy_text_is_that_of_fp32_on_a_cpu(gpus, drafts, graphs):
    prompts = [random_prompt(n, seed=13) for n in (5, 64, 300)]
    server = Server(SHIPPED, *SMALL, "--tp-size", str(gpus), *drafts, *graphs).wait()
    try:
        reference = Reference(SHIPPED)
        cold = server.greedy(prompts, 80, return_logprob=True)
        check_greedy(reference, prompts, cold)
        turns = [
            prompt + answer.token_ids + random_prompt(5, seed=3)
            for prompt, answer in zip(prompts, cold, strict=True)
        ]
        warm = server.greedy(turns, 16, return_logprob=True)
        check_greedy(reference, turns, warm)
        assert all(answer.cached >= 64 for answer in warm)
        log = server.process.text()
        assert "serves this model on SGLang" in log
        assert "with Triton kernels" in log
    finally:
        server.close()
