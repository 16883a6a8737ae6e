"""Speculation changes no token: off, every draft length, and adaptive, under load."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import pytest
import torch

from checkpoints import SHIPPED
from engines.clients import eventually
from engines.dialogues import PARSERS, Dialogue, check_dialogues, dialogues
from engines.traffic import BLOCKS, Request, growing, requests, send, source_tokens
from engines.vllm.server import Forked
from reference import Ids, Reference
from tiers import long_except

pytestmark = pytest.mark.serve

CLIENTS, ALONE = 16, 12
TALKS = {"float32": 2, "bfloat16": 0}  # dialogues with tools
# Prompts in chunks, and memory for so few clients that some are preempted, whenever they come.
FLAGS = (
    "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "14", *PARSERS["vllm"],
)  # fmt: skip
CASES = {"k=1": (1, "fixed"), "k=2": (2, "fixed"), "k=3": (3, "fixed"), "k=4": (4, "fixed")}
CASES["adaptive"] = (4, "adaptive")
# Of bf16 answers, how many may differ. AMX products, which vLLM uses where there are any, round a
# row by how many rows there are (7 of 224 measured); oneDNN's others hardly do (0 of 210).
DIFFER = 0.05 if torch.cpu._is_amx_tile_supported() else 0.01
# A step beside decoding requests reads 8 tokens of prompts, in turns: none fits the budget. Not in
# the case that must preempt: so slowly do requests begin that they are never too many.
PACED = {"QWEN3NEXT_STEP_SECONDS": "0.000001"}
ALWAYS = "adaptive"  # the other cases, each a server of its own, with --long


class Run(NamedTuple):
    """What the requests of this test get from one server: the first few alone, then all at once."""

    answers: Sequence[Ids | None]  # None: the client hung up
    preempted: float  # requests
    said: Sequence[Sequence[Dialogue]]  # in dialogues with tools, whole and in a stream


def run(
    batch: Sequence[Request],
    dtype: str,
    *flags: str,
    talks: int = 0,
    env: dict[str, str] | None = None,
) -> Run:
    server = Forked(SHIPPED, "--dtype", dtype, *FLAGS, *flags, env=env).wait()
    try:
        found = send(server, batch[:ALONE], 1) + send(server, batch, CLIENTS)
        metrics = server.metrics()
        assert eventually(lambda: server.metrics()["vllm:kv_cache_usage_perc"] == 0)
        said = [dialogues(server, talks, stream=stream) for stream in (False, True)]
    finally:
        server.close()
    # else the test would not see what it is for
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    if flags:
        assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert sum(answer is not None for answer in found) >= 0.75 * len(found)
    return Run(found, metrics["vllm:num_preemptions_total"], said)


@pytest.fixture(scope="module")
def traffic(size) -> Sequence[Request]:
    """Two that are alike come first: the second finds the prefix of the first in the cache.

    Behind the first few stand some that each outgrow a block while others wait for one.
    """
    ids = source_tokens()
    alike = Request(tuple(ids[:850]), 8)  # two blocks and more in fp32 and in bf16
    grow = [request for block in BLOCKS for request in growing(size(6, 12), block)]
    mixed = requests(size(30, 248), seed=8, abort_share=0.15, tokens=32)
    return [alike, alike, *mixed[: ALONE - 2], *grow, *mixed[ALONE - 2 :]]


@pytest.fixture(scope="module")
def without_drafts(traffic) -> Callable[[str], Run]:
    return cache(lambda dtype: run(traffic, dtype, talks=TALKS[dtype]))


@pytest.fixture(scope="module")
def with_drafts(traffic) -> Callable[[str, str], Run]:
    @cache
    def with_drafts(dtype: str, case: str) -> Run:
        num_drafts, schedule = CASES[case]
        drafts = json.dumps({"method": "mtp", "num_speculative_tokens": num_drafts})
        env = {"QWEN3NEXT_DRAFTS": schedule}
        if dtype == "float32" and case != ALWAYS:
            env |= PACED
        talks = TALKS[dtype] if case == ALWAYS else 0
        return run(traffic, dtype, "--speculative-config", drafts, talks=talks, env=env)

    return with_drafts


@pytest.mark.parametrize("case", long_except([ALWAYS], CASES))
def test_the_same_tokens_as_without_drafts(without_drafts, with_drafts, case):
    """In fp32, where no token hangs on a rounding."""
    assert with_drafts("float32", case).answers == without_drafts("float32").answers


def test_dialogues_with_tools_are_right_and_the_same(without_drafts, with_drafts):
    """Calls, thoughts and answers, by MTP and without it."""
    held, streamed = without_drafts("float32").said
    check_dialogues(held, streamed)
    assert with_drafts("float32", ALWAYS).said == [held, held]


# bf16: a token may hang on a rounding, but on nothing else --------------------------------------


class Margins:
    """How far apart two tokens are in exact arithmetic, and how far bf16 moves a token.

    `noise`: of the log-probabilities that transformers computes in bf16, one in twenty is farther
    from the exact one. Where a step shares its products with other rows, they round otherwise.
    """

    def __init__(self, exact: Reference, texts: Sequence[Ids]) -> None:
        self.exact = exact
        rounded = Reference(SHIPPED, torch.bfloat16)
        errors = [rounded.prompt_logprobs(ids) - exact.prompt_logprobs(ids) for ids in texts]
        self.noise = float(torch.cat(errors).abs().quantile(0.95))

    def at_first_difference(self, prompt: Ids, one: Ids, other: Ids) -> float:
        at = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        logprobs = self.exact.logprobs(prompt + one[:at])[-1]
        return float((logprobs[one[at]] - logprobs[other[at]]).abs())


@pytest.fixture(scope="module")
def margins(reference, traffic) -> Margins:
    texts = [request.prompt for request in traffic if len(request.prompt) > 100]
    return Margins(reference(SHIPPED), texts[:20])


@pytest.mark.long
@pytest.mark.parametrize("case", ["k=3", "adaptive"])
def test_bf16_differs_at_most_where_two_tokens_are_as_likely(
    without_drafts, with_drafts, traffic, margins, case
):
    runs = without_drafts("bfloat16"), with_drafts("bfloat16", case)
    expected, found = (run.answers for run in runs)
    prompts = [request.prompt for request in (*traffic[:ALONE], *traffic)]
    differ = [
        (prompt, one, other)
        for prompt, one, other in zip(prompts, expected, found, strict=True)
        if one != other
    ]
    assert len(differ) <= DIFFER * sum(answer is not None for answer in expected)
    for prompt, one, other in differ:
        assert margins.at_first_difference(prompt, one, other) < 2 * margins.noise


@pytest.mark.long
def test_a_token_that_is_clearly_another_is_no_noise(margins, traffic):
    """Of tokens that the model is sure of, none could pass for a rounding."""
    assert 0 < margins.noise < 0.2
    request = next(request for request in traffic if len(request.prompt) > 100)
    answer = margins.exact.greedy(request.prompt, 24)
    sure = margins.exact.logprobs(request.prompt + answer)[len(request.prompt) - 1 : -1]
    top = sure.topk(2).values  # [24, 2]
    at = int((top[:, 0] - top[:, 1]).argmax())
    wrong = (*answer[:at], int(sure[at].topk(2).indices[1]), *answer[at + 1 :])
    assert margins.at_first_difference(request.prompt, answer, wrong) > 2 * margins.noise


def test_requests_were_preempted(without_drafts, with_drafts, size):
    """Else the runs would not show what they are for; how many is a matter of clients' timing."""
    dtypes = size(["float32"], ["float32", "bfloat16"])
    assert sum(without_drafts(dtype).preempted for dtype in dtypes) > 0
    assert sum(with_drafts(dtype, ALWAYS).preempted for dtype in dtypes) > 0
