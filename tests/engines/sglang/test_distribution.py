"""Sampled with drafts, chains and trees: the distribution is the model's, or keeps a grammar."""

from collections.abc import Iterator

import pytest
import torch

from checkpoints import SHIPPED
from engines.distribution import PROMPT, SAMPLES, TOKENS, check_sampled
from engines.sglang.schema import TERSE, follow_a_schema
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from tiers import long_except

pytestmark = pytest.mark.serve

FLAGS = ("--dtype", "float32", "--max-total-tokens", "4000", "--random-seed", "6", *NEXTN, "3")
DRAFTS = {
    "chain": (),
    "tree": ("--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "6"),
}


@pytest.fixture(scope="module", params=DRAFTS)
def server(request) -> Iterator[Server]:
    server = Forked(SHIPPED, *FLAGS, TERSE, *DRAFTS[request.param], env=FIXED).wait()
    yield server
    server.close()


@pytest.mark.parametrize("server", long_except(["chain"], DRAFTS), indirect=True, scope="module")
def test_samples_are_distributed_as_the_model_says(server, reference):
    params = {"temperature": 1, "max_new_tokens": TOKENS, "ignore_eos": True}
    prompts = [list(PROMPT)] * SAMPLES
    answers = server.post("/generate", input_ids=prompts, sampling_params=params)
    accepted = sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
    assert accepted > 0.1 * SAMPLES  # else the test would not see what it is for
    check_sampled(reference(SHIPPED), torch.tensor([answer["output_ids"] for answer in answers]))


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_a_json_schema(server, temperature):
    """Each draft is held against the grammar at its own place in the answer."""
    assert follow_a_schema(server, temperature) > 0
