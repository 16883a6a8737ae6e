"""Served in bf16 it is no farther from fp32 than transformers in bf16 is."""

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_distance
from engines.sglang.server import NEXTN, Server

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(n, seed=10) for n in (7, 65, 400, 1000)]


def test_no_farther_from_fp32_than_transformers(tmp_path):
    checkpoint = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    small = ("--max-total-tokens", "4096", "--max-mamba-cache-size", "20")
    server = Server(checkpoint, "--dtype", "bfloat16", *NEXTN, "2", *small).wait()
    try:
        answers = server.greedy(PROMPTS, 16, return_logprob=True, logprob_start_len=0)
    finally:
        server.close()
    found = [answer.prompt_logprobs for answer in answers]
    check_distance(checkpoint, torch.bfloat16, PROMPTS, found)
    assert all(len(answer.token_ids) == 16 for answer in answers)
