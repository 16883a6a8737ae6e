"""On real GPUs: SGLang with the plugin is no farther from fp32 than transformers in bf16 is."""

from collections.abc import Sequence

import pytest
import torch

from checkpoints import SHIPPED, random_prompt
from engines.checks import Output, Prompts, check_no_farther
from engines.sglang.server import NEXTN, Server
from reference import Reference

pytestmark = pytest.mark.serve

NO_GRAPHS = ("--disable-prefill-cuda-graph", "--disable-decode-cuda-graph")
# Pages are kept at short intervals, so that answers reach several. On a GPU, SGLang's attention and
# experts are not for fp32.
SMALL = ("--dtype", "bfloat16", "--context-length", "1024", "--mamba-track-interval", "64")


@pytest.mark.parametrize("graphs", [NO_GRAPHS, ()], ids=["eager", "graphs"])
@pytest.mark.parametrize("drafts", [(), (*NEXTN, "3")], ids=["plain", "nextn-3"])
def test_logprobs_are_no_farther_from_fp32_on_a_cpu(gpus, drafts, graphs):
    prompts = [random_prompt(n, seed=13) for n in (5, 64, 300)]
    server = Server(SHIPPED, *SMALL, "--tp-size", str(gpus), *drafts, *graphs).wait()
    try:
        cold = server.greedy(prompts, 80, return_logprob=True)
        check(prompts, cold)
        turns = [
            prompt + answer.token_ids + random_prompt(5, seed=3)
            for prompt, answer in zip(prompts, cold, strict=True)
        ]
        warm = server.greedy(turns, 80, return_logprob=True)
        check(turns, warm)
        assert all(answer.cached >= 64 for answer in warm)
        log = server.process.text()
        assert "serves this model on SGLang" in log
        assert "with Triton kernels" in log
    finally:
        server.close()


def check(prompts: Prompts, answers: Sequence[Output]) -> None:
    """Of the answers' tokens; prompts from the cache have no log-probabilities."""
    pairs = list(zip(prompts, answers, strict=True))
    exact, theirs = (
        [model.prompt_logprobs(prompt + a.token_ids)[len(prompt) - 1 :] for prompt, a in pairs]
        for model in (Reference(SHIPPED), Reference(SHIPPED, torch.bfloat16))
    )
    check_no_farther([answer.logprobs or () for answer in answers], theirs, exact)
