"""Two tensor-parallel ranks compute what one does."""

from pathlib import Path

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.process import CPUS
from engines.sglang.server import NEXTN, Forked
from family import FAMILY

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(len(CPUS) < 2, reason="two ranks need two cores"),
]


@pytest.fixture(params=["qwen3-next", "qwen3.5"])
def folder(request, checkpoint, tmp_path) -> Path:
    if request.param == "qwen3-next":
        return checkpoint
    return FAMILY["moe_HV=4H_top-3-of-12_5-layers"].write(tmp_path)


def test_two_ranks_with_drafts(folder, reference):
    """They draft what the first rank decides. Few tokens: ranks that share a core are slow."""
    small = ("--dtype", "float32", "--max-total-tokens", "4096", "--max-mamba-cache-size", "20")
    env = {"SGLANG_CPU_OMP_THREADS_BIND": f"{CPUS[0]}|{CPUS[1]}", "TEST_DRAFTS": "3,0,1"}
    server = Forked(folder, "--tp-size", "2", *NEXTN, "3", *small, env=env).wait()
    try:
        prompts = [random_prompt(n, seed=12) for n in (1, 65, 300)]
        answers = server.greedy(prompts, 12, return_logprob=True, logprob_start_len=0)
    finally:
        server.close()
    check_greedy(reference(folder), prompts, answers)
    assert sum(answer.accepted for answer in answers) > 0
