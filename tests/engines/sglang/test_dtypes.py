"""Served in bf16 it is no farther from fp32 than transformers in bf16 is.

Quantised checkpoints than transformers with the dequantised weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from checkpoints import random_prompt, write_checkpoint
from engines.checks import SERVED_IN_BF16, check_distance
from engines.sglang.server import NEXTN, Forked
from quantised import quantise
from qwen3next_plugin.kernels import native
from qwen3next_plugin.mtp.draft_head import DRAFTED

pytestmark = pytest.mark.serve

# Of 1,500 tokens the distances' medians still differ by a tenth, by which experts are nearly equal.
PROMPTS = [random_prompt(n, seed=seed) for seed in (10, 11, 12) for n in (7, 65, 400, 1000)]


SMALL = ("--max-total-tokens", "4096", "--max-mamba-cache-size", "20")
FP32_HEAD = "--enable-fp32-lm-head"
# A head in bf16 is ours where there are bf16 instructions, else oneDNN's. Ours makes fp32 logits.
OUR_HEAD = "avx512bf16" in native.levels()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")  # more tokens than a draft chooses from
    return write_checkpoint(folder, dtype=torch.bfloat16, vocab_size=DRAFTED + 500)


@contextmanager
def served(checkpoint: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Forked]:
    flags = ("--dtype", "bfloat16", *NEXTN, "2", *SMALL, *flags)
    server = Forked(checkpoint, *flags, env=env).wait()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[Forked]:
    with served(checkpoint) as server:
        yield server


def distance_from_steps_of_bf16(server: Forked) -> float:
    """How far the differences of logits are from whole steps of bf16, at most."""
    params = {"temperature": 0, "max_new_tokens": 2}
    answer = server.post(
        "/generate", input_ids=list(PROMPTS[0]), sampling_params=params,
        return_logprob=True, top_logprobs_num=20,
    )  # fmt: skip
    top = torch.tensor([line[0] for line in answer["meta_info"]["output_top_logprobs"][1]])
    steps = (top - top[0]) * 2**10
    return float((steps - steps.round()).abs().max())


def test_the_head_is_in_fp32_where_that_is_asked_for(server, checkpoint):
    with served(checkpoint, FP32_HEAD) as with_fp32_head:
        assert (distance_from_steps_of_bf16(server) > 0.01) == OUR_HEAD
        assert distance_from_steps_of_bf16(with_fp32_head) > 0.01


def test_no_farther_from_fp32_than_transformers(server, checkpoint):
    check_distance(checkpoint, torch.bfloat16, PROMPTS, prompt_logprobs(server))


@pytest.mark.long
@pytest.mark.parametrize("kind", SERVED_IN_BF16)
def test_quantised_no_farther_from_fp32_than_transformers(tmp_path, kind):
    plain = write_checkpoint(tmp_path / "plain", dtype=torch.bfloat16, hidden_size=160)
    folder, env, twin = quantise(plain, tmp_path, kind)
    with served(folder, env=env) as server:
        check_distance(twin, torch.bfloat16, PROMPTS, prompt_logprobs(server))


def prompt_logprobs(server: Forked) -> list[tuple[float, ...]]:
    answers = server.greedy(PROMPTS, 16, return_logprob=True, logprob_start_len=0)
    assert all(len(answer.token_ids) == 16 for answer in answers)
    return [answer.prompt_logprobs for answer in answers]
