"""Whatever a request asks of its sampling: the same text with drafts as without, token for token.

All cases run at once, each beside all others, on an engine that has room for half of them.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.checks import Output
from engines.traffic import source_tokens
from engines.vllm.offline import Offline
from tiers import long_except

pytestmark = pytest.mark.serve

LENGTH = 288
THINK = "def"
FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "skip_tokenizer_init": False,
    "max_model_len": LENGTH,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 96,  # long prompts come in chunks
    "num_gpu_blocks_override": 42,  # and some requests are preempted
    # without blanks a schema's answer is bounded: it ends, whatever the model likes to write
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "reasoning_config": {"reasoning_start_str": THINK, "reasoning_end_str": "\n\n"},
}
DRAFTS = {"fixed": 3, "adaptive": 4}  # QWEN3NEXT_DRAFTS, num_speculative_tokens

HEAD = "class TextWrapper:\n    def __init__(self, text):\n        self.text = text\n\n    "
SAMPLED = {"temperature": 0.9, "seed": 7, "max_tokens": 48}
GREEDY = {"temperature": 0.0, "max_tokens": 48}
TEXT = {"detokenize": True, "ignore_eos": False}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 9999},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
# Case → what it asks beyond SAMPLED, on the same prompt and seed: each changes the text.
CHANGES: Mapping[str, dict[str, Any]] = {
    "another seed": {"seed": 8},
    "temperature": {"temperature": 1.4},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.3},
    "top_k, top_p and min_p": {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.2},
    "repetition_penalty": {"repetition_penalty": 1.6},
    "logit_bias": {"logit_bias": {10: 3.0, 14: -100.0, 200: 4.0}},
    "allowed_token_ids": {"allowed_token_ids": list(range(10, 90))},
    "bad_words": {"bad_words": [" self", "    return", "text", "line"], **TEXT},
    "stop_token_ids": {"stop_token_ids": list(range(10, 60))},
    "min_tokens": {"stop_token_ids": list(range(10, 60)), "min_tokens": 30},
    "min_tokens with penalties": {"stop_token_ids": [10, 11], "min_tokens": 9, "top_p": 0.4}
    | {"frequency_penalty": 0.4},
    "stop": {"stop": ["te", "(s", "\n\n"], **TEXT},
    "stop, kept": {"stop": ["te", "(s"], "include_stop_str_in_output": True, **TEXT},
    "stop and min_tokens": {"stop": ["t", "e"], "min_tokens": 17, **TEXT},
    "regex": {"structured_outputs": {"regex": r"[a-f]{3,20}-\d{2,9}(, [x-z]+)*"}, **TEXT},
    "choice": {
        "structured_outputs": {"choice": ["yes, it is", "no, it is not", "not yet"]},
        **TEXT,
    },
    "json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 140, **TEXT},
    "json and penalties": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 140, **TEXT}
    | {"repetition_penalty": 1.2, "top_k": 30},
    "thinking_token_budget": {"thinking_token_budget": 5},
    "thinking budget and penalties": {"thinking_token_budget": 11, "presence_penalty": 0.5},
}
# The same with the likeliest token.
GREEDY_CHANGES: Mapping[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {10: 12.0, 200: -9.0}},
    "bad_words": {"bad_words": [" self", "    return", "text", "line"], **TEXT},
    "stop": {"stop": ["te", "(s"], **TEXT},
    "json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 140, **TEXT},
    "thinking_token_budget": {"thinking_token_budget": 9},
}
# What changes no text, or stands on prompts of its own.
OTHERS: Mapping[str, dict[str, Any]] = {
    "sampled": SAMPLED,
    "greedy": GREEDY,
    "logprobs": SAMPLED | {"logprobs": 4, "prompt_logprobs": 2},
    "greedy, logprobs": GREEDY | {"logprobs": 0},
    "logprob_token_ids": SAMPLED | {"logprob_token_ids": [5, 9, 300]},
    "n": SAMPLED | {"n": 3},
    "one token": SAMPLED | {"max_tokens": 1},
    "two tokens": SAMPLED | {"max_tokens": 2},
    "chunks": SAMPLED | {"seed": 11},
    "chunks, logprobs": SAMPLED | {"seed": 12, "logprobs": 1, "prompt_logprobs": 0},
    "to the end": SAMPLED | {"max_tokens": LENGTH, "seed": 13},
    "greedy to the end": GREEDY | {"max_tokens": LENGTH},
}
CASES = (
    dict(OTHERS)
    | {name: SAMPLED | change for name, change in CHANGES.items()}
    | {f"greedy, {name}": GREEDY | change for name, change in GREEDY_CHANGES.items()}
)


@cache
def prompts() -> dict[str, tuple[int, ...]]:
    """A prompt for each case: the same function's head, or longer text where its name says so."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    head = tokenizer.encode(HEAD).ids + tokenizer.encode(THINK).ids
    text = source_tokens()
    own = {"chunks": text[:200], "chunks, logprobs": text[300:531], "to the end": text[600:850]}
    own["greedy to the end"] = text[900:1153]
    return {name: tuple(own.get(name, head)) for name in CASES}


def run(**flags: Any) -> tuple[dict[str, list[Output]], dict[str, float]]:
    """Each case's outputs, and the engine's counters."""
    engine = Offline(SHIPPED, **FLAGS, **flags)
    try:
        outputs = engine.generate(list(prompts().values()), list(CASES.values()))
        counters = engine.counters()
    finally:
        engine.close()
    assert counters["vllm:num_preemptions"] > 0
    return dict(zip(CASES, outputs, strict=True)), counters


@pytest.fixture(scope="module")
def without_drafts() -> dict[str, list[Output]]:
    return run()[0]


@pytest.fixture(scope="module", params=long_except(("adaptive",), DRAFTS))
def with_drafts(request) -> dict[str, list[Output]]:
    drafts = {"method": "mtp", "num_speculative_tokens": DRAFTS[request.param]}
    outputs, counters = run(speculative_config=drafts, env={"QWEN3NEXT_DRAFTS": request.param})
    tokens = sum(len(each.token_ids) for case in outputs.values() for each in case)
    # else the test would not see what it is for
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    rejected = counters["vllm:spec_decode_num_draft_tokens"] - accepted
    assert min(accepted, rejected) > (0.1 * tokens if request.param == "fixed" else 0)
    return outputs


@pytest.mark.parametrize("case", CASES)
def test_same_as_without_drafts(without_drafts, with_drafts, case):
    for found, expected in zip(with_drafts[case], without_drafts[case], strict=True):
        assert found.token_ids == expected.token_ids
        assert found.text == expected.text
        assert found.finish_reason == expected.finish_reason
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert found.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-4)


@pytest.mark.parametrize("case", CHANGES)
def test_the_case_changes_the_text(without_drafts, case):
    assert without_drafts[case][0].token_ids != without_drafts["sampled"][0].token_ids


@pytest.mark.parametrize("case", GREEDY_CHANGES)
def test_the_greedy_case_changes_the_text(without_drafts, case):
    assert without_drafts[f"greedy, {case}"][0].token_ids != without_drafts["greedy"][0].token_ids


def test_the_cases_end_where_they_should(without_drafts):
    stopped = {name for name, (one, *_) in without_drafts.items() if one.finish_reason == "stop"}
    ends = {"stop", "stop, kept", "stop_token_ids", "choice", "json", "json and penalties"}
    assert ends <= stopped
    long = without_drafts["to the end"][0]
    assert len(prompts()["to the end"]) + len(long.token_ids) == LENGTH
    assert len({output.token_ids for output in without_drafts["n"]}) == 3
