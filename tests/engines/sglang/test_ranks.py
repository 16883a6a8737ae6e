"""Two tensor-parallel ranks compute what one does; in bf16 they give the same bits in any batch."""

from pathlib import Path

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.bits import INVARIANT
from engines.bits import prompts as texts
from engines.checks import check_greedy
from engines.sglang.server import FIXED, NEXTN, Forked
from family import FAMILY
from needs import needs

pytestmark = [
    pytest.mark.serve,
    needs("two-cores"),
]


@pytest.fixture(params=["qwen3-next", "qwen3.5"])
def folder(request, checkpoint, tmp_path) -> Path:
    if request.param == "qwen3-next":
        return checkpoint
    return FAMILY["moe_HV=4H_top-3-of-12_5-layers"].write(tmp_path)


def test_two_ranks_with_drafts(folder, reference):
    """They draft, and read of prompts, what the first rank decides.

    Few tokens: ranks that share a core are slow.
    """
    small = ("--dtype", "float32", "--max-total-tokens", "4096", "--max-mamba-cache-size", "20")
    env = {"TEST_DRAFTS": "3,0,1", "TEST_CHUNKS": "24,8,40"}
    server = Forked(folder, "--tp-size", "2", *NEXTN, "3", *small, env=env).wait()
    try:
        prompts = [random_prompt(n, seed=12) for n in (1, 65, 300)]
        answers = server.greedy(prompts, 12, return_logprob=True, logprob_start_len=0)
    finally:
        server.close()
    check_greedy(reference(folder), prompts, answers)
    assert sum(answer.accepted for answer in answers) > 0


@pytest.mark.long
def test_two_ranks_give_the_same_bits_again_in_a_batch_and_with_drafts():
    prompts = texts(many=False)[::3]
    flags = ("--tp-size", "2", "--dtype", "bfloat16", "--max-total-tokens", "8192")
    found = []
    for more in ((), (*NEXTN, "3")):
        server = Forked(SHIPPED, *flags, *more, env=INVARIANT | FIXED).wait()
        try:
            options = {"return_logprob": True, "logprob_start_len": 0}
            found.append([server.greedy([ids], 8, **options)[0] for ids in prompts])
            server.forget()
            found.append(server.greedy(prompts, 8, **options))
        finally:
            server.close()
        assert any(one.accepted for one in found[-1]) == bool(more)
    bits = [[(o.token_ids, o.logprobs, o.prompt_logprobs) for o in run] for run in found]
    assert bits[1:] == bits[:1] * 3
