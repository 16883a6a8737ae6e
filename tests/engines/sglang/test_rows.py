"""Answers that end at the context length, or the pool's: a step with drafts reserves more."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import SHIPPED
from engines.sglang.server import FIXED, NEXTN, Forked
from tiers import long_except

pytestmark = pytest.mark.serve

CONTEXT, POOL, REQUESTS = 300, 256, 4
SMALL = ("--dtype", "float32", "--context-length", str(CONTEXT), "--max-running-requests", "8")
DRAFTS = {"8 drafts": ("8",), "trees": ("3", "--speculative-eagle-topk", "4")}


def answers(*flags: str, together: int) -> list[tuple[str, list[int]]]:
    """Why answers of any length ended, and their tokens."""
    server = Forked(SHIPPED, *NEXTN, *flags, *SMALL, env=FIXED).wait()
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": None}

    def ask(first: int) -> tuple[str, list[int]]:
        prompt = [5 + first, 6, 7]
        answer = server.post("/generate", input_ids=prompt, sampling_params=params)
        return answer["meta_info"]["finish_reason"]["type"], answer["output_ids"]

    with ThreadPoolExecutor(together) as pool:
        found = list(pool.map(ask, range(REQUESTS)))
    server.close()
    return found


@pytest.mark.parametrize("drafts", long_except(["8 drafts"], DRAFTS))
def test_answers_end_where_nothing_is_left(drafts):
    whole = answers(*DRAFTS[drafts], "--max-total-tokens", "8192", together=REQUESTS)
    assert {(why, len(ids)) for why, ids in whole} == {("length", CONTEXT - 5)}
    alone = answers("3", "--max-total-tokens", str(POOL), together=1)
    assert alone == [("length", ids[: POOL - 5]) for _, ids in whole]
