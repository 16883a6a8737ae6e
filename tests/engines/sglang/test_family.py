"""Qwen3.5 and later, served by SGLang in fp32: transformers' numbers, with and without drafts."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.checks import TOKENS, check_greedy
from engines.long_context import YARN, with_yarn
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from engines.traffic import source_tokens
from family import FAMILY, rewrite
from reference import Reference

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(length) for length in (1, 2, 3, 4, 63, 64, 65, 1000)]
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
SMALL = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-mamba-cache-size", "40")
TEXT_ONLY = ("--language-model-only",)
LONG = ("--json-model-override-args", json.dumps({"rope_scaling": YARN}))


class Case(NamedTuple):
    """A server: the drafts of a step and its flags."""

    steps: int
    flags: tuple[str, ...] = ()


DENSE_1, DENSE_3, MOE_4, MOE_2 = FAMILY
CASES = {
    DENSE_1: Case(1, ("--chunked-prefill-size", "67")),
    DENSE_3: Case(2, TEXT_ONLY),
    MOE_4: Case(3, ("--chunked-prefill-size", "257")),
    MOE_2: Case(4, (*TEXT_ONLY, *LONG, "--context-length", "2048")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(case, tmp_path_factory) -> Iterator[Server]:
    folder = FAMILY[case].write(tmp_path_factory.mktemp("family"))
    steps, flags = CASES[case]
    server = Forked(folder, *SMALL, *NEXTN, str(steps), *flags, env=FIXED).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(server, case, reference, tmp_path_factory) -> Reference:
    """With YaRN, prompts go beyond the original length."""
    if set(LONG) <= set(CASES[case].flags):
        return reference(with_yarn(server.folder, tmp_path_factory.mktemp("yarn") / "file"))
    return reference(server.folder)


def test_all_prompts_in_one_batch(server, model):
    check_greedy(model, PROMPTS, server.greedy(PROMPTS, TOKENS, **LOGPROBS))


def test_continued_texts_hit_the_cache(server, model):
    server.forget()
    starts = [random_prompt(n, seed=1) for n in (64, 300)]
    cold = server.greedy(starts, TOKENS)
    turns = [
        start + answer.token_ids + random_prompt(7, seed=2)
        for start, answer in zip(starts, cold, strict=True)
    ]
    warm = server.greedy(turns, TOKENS, return_logprob=True)
    assert all(answer.cached >= len(start) for answer, start in zip(warm, starts, strict=True))
    check_greedy(model, turns, warm)


def test_drafts_are_accepted_as_often_as_the_reference_head_is_right(server, case, model):
    prompts, num_drafts = [random_prompt(n, seed=4) for n in (5, 64, 130)], CASES[case].steps
    answers = server.greedy(prompts, 64)
    accepted = sum(answer.accepted for answer in answers)
    check_greedy(model, prompts, answers)
    right = sum(
        model.accepted(prompt, answer.token_ids, num_drafts)[1]
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    assert accepted > 0
    # A request's last drafts may be cut short by its token limit, so a few may differ.
    assert accepted == pytest.approx(right, abs=num_drafts * len(prompts))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> list:
    """The shipped checkpoint in each layout, and the flags for it."""
    folder = tmp_path_factory.mktemp("layouts")
    return [
        (SHIPPED, ()),
        (rewrite(SHIPPED, folder / "text"), ()),
        (rewrite(SHIPPED, folder / "wrapped", wrapped=True, fused=False), TEXT_ONLY),
    ]


def test_the_same_weights_in_each_layout_give_the_same_bits(layouts):
    """In steps that verify drafts and in plain ones."""
    ids = source_tokens()
    prompts = [tuple(ids[100 * i :][: 10 + 90 * i]) for i in range(4)]
    found = []
    for folder, flags in layouts:
        env = {"TEST_DRAFTS": "0,3,0,2"}
        server = Forked(folder, *SMALL, *NEXTN, "3", *flags, env=env).wait()
        try:
            answers = [server.greedy([prompt], 48, **LOGPROBS)[0] for prompt in prompts]
        finally:
            server.close()
        found.append([(a.token_ids, a.logprobs, a.prompt_logprobs, a.accepted) for a in answers])
    assert found[0] == found[1] == found[2]
    assert any(accepted > 0 for *_, accepted in found[0])
