"""Two tensor-parallel ranks compute what one does."""

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.process import CPUS
from engines.sglang.server import NEXTN, Server

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(len(CPUS) < 2, reason="two ranks need two cores"),
]


def test_two_ranks_with_drafts(checkpoint, reference):
    """Few tokens: ranks wait for each other busily, which is slow where they share their cores."""
    small = ("--dtype", "float32", "--max-total-tokens", "4096", "--max-mamba-cache-size", "20")
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": f"{CPUS[0]}|{CPUS[1]}"}
    server = Server(checkpoint, "--tp-size", "2", *NEXTN, "3", *small, env=bind).wait()
    try:
        prompts = [random_prompt(n, seed=12) for n in (1, 65, 300)]
        answers = server.greedy(prompts, 12, return_logprob=True, logprob_start_len=0)
    finally:
        server.close()
    check_greedy(reference(checkpoint), prompts, answers)
    assert sum(answer.accepted for answer in answers) > 0
