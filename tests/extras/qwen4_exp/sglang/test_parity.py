"""Qwen4-Exp (Qwen3.8-Flash-Next) under SGLang: in fp32, what transformers computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch

from checkpoints import random_prompt, write_tokenizer
from engines.bits import INVARIANT
from engines.checks import TOKENS, TOLERANCE, check_greedy
from engines.sglang.server import FIXED, NEXTN, Answer, Forked, Server
from extras.qwen4_exp.model import StreamsReference, write_qwen4_exp
from extras.qwen4_exp.prompts import OTHER_SIZES, PROMPTS, SLICE, with_ends_of_text
from needs import needs

pytestmark = pytest.mark.serve

DRAFTS = 4
LOGPROBS: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0}
POOLS = ("--max-total-tokens", "16384", "--max-mamba-cache-size", "40")
FLAGS = (*NEXTN, str(DRAFTS), *POOLS, "--chunked-prefill-size", str(SLICE))
FP32 = ("--dtype", "float32", *FLAGS)
IN_TURN = {"TEST_DRAFTS": "0,4,1,402"}  # drafts of each request, step by step
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "15"}


def written(folder: Path, **options: Any) -> Path:
    write_qwen4_exp(folder, **options)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("qwen4_exp"))


@pytest.fixture(scope="module")
def model(folder) -> StreamsReference:
    return StreamsReference(folder)


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    server = Forked(folder, *FP32, env=FIXED).wait()
    yield server
    server.close()


def test_all_prompts_in_one_batch(server, model):
    answers = server.greedy(PROMPTS, TOKENS, **LOGPROBS)
    assert sum(answer.accepted for answer in answers) > 0
    check_greedy(model, PROMPTS, answers)


def test_each_prompt_alone(server, model):
    prompts = PROMPTS[1::3]
    answers = [server.greedy([prompt], TOKENS, **LOGPROBS)[0] for prompt in prompts]
    check_greedy(model, prompts, answers)


def test_ends_of_text_end_n_grams(server, model):
    prompts = with_ends_of_text(model.trunk.config.eos_token_id)
    check_greedy(model, prompts, server.greedy(prompts, TOKENS, **LOGPROBS))


def test_continued_texts_hit_the_cache(server, model):
    """Anywhere in a block of the indexer; and the tail of a rejected draft is not part of a hit."""
    server.forget()
    starts = [random_prompt(n, seed=33) for n in (64, 65, 66, 67, 300)]
    cold = server.greedy(starts, TOKENS)
    pairs = zip(starts, cold, strict=True)
    turns = [start + one.token_ids + random_prompt(7, seed=2) for start, one in pairs]
    warm = server.greedy(turns, TOKENS, return_logprob=True)
    pairs = zip(warm, starts, strict=True)
    assert all(answer.cached >= len(start) for answer, start in pairs)
    check_greedy(model, turns, warm)


def test_answers_of_one_prompt_do_not_write_what_others_read(server, model):
    """Sampled, each continues a copy of the page where a slice of the prompt ended."""
    params = {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True, "n": 3}
    for prompt in (random_prompt(n, seed=35) for n in (66, 131, 300)):
        asked = {"input_ids": list(prompt), "sampling_params": params, "return_logprob": True}
        answers = [Answer.of(each, **asked) for each in server.post("/generate", **asked)]
        assert len({answer.token_ids for answer in answers}) == len(answers) == 3
        for answer in answers:
            assert answer.cached >= (SLICE if len(prompt) > SLICE else 0)
            exact = model.prompt_logprobs(prompt + answer.token_ids)[-TOKENS:]
            assert (torch.tensor(answer.logprobs) - exact).abs().max() < TOLERANCE


def test_drafts_are_accepted_as_often_as_the_reference_head_is_right(server, model):
    server.forget()
    prompt = random_prompt(130, seed=34)
    (answer,) = server.greedy([prompt], 64)
    made, right = model.accepted(prompt, answer.token_ids, DRAFTS)
    assert right > 0.2 * made
    assert abs(answer.accepted - right) <= DRAFTS


def test_weights_are_not_updated(server):
    refused = refusal(server, "/update_weights_from_disk", model_path=str(server.folder))
    assert "several streams are not updated" in refused


def test_other_sizes_retracted_and_with_changing_drafts(tmp_path):
    folder = written(tmp_path, seed=1, **OTHER_SIZES)
    flags = (*FP32, "--enable-metrics")
    server = Forked(folder, *flags, env=IN_TURN | RETRACT).wait()
    try:
        answers = server.greedy(PROMPTS, 2 * TOKENS, **LOGPROBS)
        assert server.metrics()["sglang:num_retracted_requests_total"] > 0
    finally:
        server.close()
    check_greedy(StreamsReference(folder), PROMPTS, answers)


@needs("two-cores")
def test_a_model_with_a_vision_tower_is_served_for_texts_on_two_ranks(tmp_path, model):
    """And its table of n-grams in memory. Without the radix cache SGLang takes embeddings."""
    folder = written(tmp_path, wrapped=True)
    env = IN_TURN | {"QWEN3NEXT_NGRAM": "resident"}
    server = Forked(folder, *FP32, "--tp-size", "2", "--disable-radix-cache", env=env).wait()
    prompts = [random_prompt(n, seed=12) for n in (1, 130, 300)]
    try:
        assert server.process.text().count("is served for texts") == 1
        embeds = [[0.0] * 64] * 3
        assert "n-grams are of tokens" in refusal(server, "/generate", input_embeds=embeds)
        said = refusal(server, "/generate", input_ids=[5], image_data="data:image/png;base64,AA")
        assert "served for texts" in said
        answers = server.greedy(prompts, 12, **LOGPROBS)
    finally:
        server.close()
    check_greedy(model, prompts, answers)
    assert sum(answer.accepted for answer in answers) > 0


def test_in_bf16_a_token_has_the_same_bits_alone_in_a_batch_and_with_drafts(folder):
    """And from the radix cache, and in slices of other sizes."""
    found, cached = [], []
    for slices, env in (("257", IN_TURN), ("67", {"TEST_DRAFTS": "0"})):
        flags = ("--dtype", "bfloat16", *FLAGS, "--chunked-prefill-size", slices)
        server = Forked(folder, *flags, env=INVARIANT | env).wait()
        try:
            if not found:
                found.append([server.greedy([prompt], TOKENS, **LOGPROBS)[0] for prompt in PROMPTS])
            found.append(server.greedy(PROMPTS, TOKENS, **LOGPROBS))
            begun = server.greedy(PROMPTS, TOKENS // 2)
            pairs = zip(PROMPTS, begun, strict=True)
            texts = [prompt + one.token_ids for prompt, one in pairs]
            cached.append(server.greedy(texts, TOKENS // 2, return_logprob=True))
        finally:
            server.close()
    assert [bits(run) for run in found[1:]] == [bits(found[0])] * 2
    for run in cached:
        assert max(answer.cached for answer in run) > SLICE
        assert bits(run, prompts=False) == ends(found[0], TOKENS // 2)


def refusal(server: Server, path: str, **body: Any) -> str:
    """What the server answers to a request that it refuses."""
    with pytest.raises(HTTPError) as refused:
        server.post(path, **body)
    assert refused.value.code == 400
    return refused.value.read().decode()


def bits(run: list[Answer], *, prompts: bool = True) -> list[Any]:
    return [(one.token_ids, one.logprobs, one.prompt_logprobs if prompts else None) for one in run]


def ends(run: list[Answer], tokens: int) -> list[Any]:
    """The last tokens of each answer."""
    return [(one.token_ids[-tokens:], (one.logprobs or ())[-tokens:], None) for one in run]
