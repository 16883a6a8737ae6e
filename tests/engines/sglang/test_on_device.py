"""The GPU's path through the engine, on a CPU: Triton's interpreter in place of a GPU.

Greedy text and log-probabilities are transformers' own, with drafts and without, through chunks of
a prompt, cached prefixes and mixed batches, however the radix cache keeps its pages.
"""

import json
import re

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import check_greedy
from engines.sglang.server import NEXTN, Forked
from reference import Reference

pytestmark = pytest.mark.serve

ON_DEVICE = {"TEST_ON_DEVICE": "1", "QWEN3NEXT_STEP_SECONDS": "0"}  # steps have a budget on CPUs
IN_TRITON = ON_DEVICE | {"QWEN3NEXT_KERNELS": "triton"}
SMALL = ("--dtype", "float32", "--max-total-tokens", "4096", "--max-mamba-cache-size", "40")
# A layer of each kind, and few heads: the interpreter is slow, and runs a program for each head.
ONE_OF_EACH = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SNAPSHOTS = ("--mamba-radix-cache-strategy", "extra_buffer", "--mamba-track-interval", "64")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Reference(checkpoint)


@pytest.mark.parametrize(
    ("flags", "cached"),
    [
        (("--chunked-prefill-size", "150"), (0, 64, 64, 192, 143)),
        ((*NEXTN, "3"), (0, 64, 64, 192, 192)),
    ],
    ids=["chunks-of-150", "nextn-3"],
)
def test_as_transformers(checkpoint, reference, flags, cached):
    """Prompts that end before, at and after a multiple of 64, where a page is kept, and answers
    that pass one; then texts that go on from the last page that was kept. SGLang counts from where
    a chunk begins in a prompt, and from 0 in an answer."""
    prompts = [random_prompt(n, seed=12) for n in (3, 58, 64, 160, 200)]
    server = Forked(checkpoint, *SMALL, *SNAPSHOTS, *flags, env=ON_DEVICE).wait()
    try:
        check_greedy(reference, prompts, cold := server.greedy(prompts, 40))
        turns = [
            prompt + answer.token_ids + random_prompt(5, seed=3)
            for prompt, answer in zip(prompts, cold, strict=True)
        ]
        warm = server.greedy(turns, 40, return_logprob=True)
        check_greedy(reference, turns, warm)
        assert [answer.cached for answer in warm] == list(cached)
        assert (sum(answer.accepted for answer in warm) > 0) == (NEXTN[1] in flags)
    finally:
        server.close()


def test_changing_numbers_of_drafts_as_transformers(checkpoint, reference, tmp_path):
    """Our policy behind --speculative-adaptive: it changes lengths while answers are made."""
    config = tmp_path / "adaptive.json"
    config.write_text(json.dumps({"1": {"candidate_steps": [0, 1, 3]}}))
    adaptive = ("--speculative-adaptive", "--speculative-adaptive-config", str(config))
    flags = (*SNAPSHOTS, *NEXTN, "3", *adaptive, "--disable-cuda-graph")  # a CPU has no graphs
    server = Forked(checkpoint, *SMALL, *flags, env=ON_DEVICE).wait()
    try:
        prompts = [random_prompt(n, seed=12) for n in (3, 64, 200)]
        answers = server.greedy(prompts, 400, return_logprob=True)
        switches = re.findall(
            r"Switch adaptive runtime state: steps (\d) -> (\d)", server.process.text()
        )
    finally:
        server.close()
    check_greedy(reference, prompts, answers)
    assert switches  # which lengths pay is up to the machine


@pytest.mark.long
def test_the_triton_kernels_as_transformers(tmp_path):
    checkpoint = write_checkpoint(tmp_path, **ONE_OF_EACH)
    reference = Reference(checkpoint)
    prompts = [random_prompt(n, seed=12) for n in (3, 66)]
    server = Forked(checkpoint, *SMALL, *SNAPSHOTS, *NEXTN, "2", env=IN_TRITON).wait()
    try:
        check_greedy(reference, prompts, server.greedy(prompts, 5, return_logprob=True))
    finally:
        server.close()
