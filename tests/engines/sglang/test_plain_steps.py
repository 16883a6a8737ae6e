"""Steps without drafts are the host's own, and answers do not change where steps switch."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS
from engines.dialogues import PARSERS, check_dialogues, dialogues
from engines.hostile import ask as post
from engines.schema import SCHEMA
from engines.sglang.schema import TERSE, follow_a_schema
from engines.sglang.server import NEXTN, Forked

pytestmark = pytest.mark.serve

FLAGS = (
    "--dtype", "float32", "--max-total-tokens", "8192", "--enable-deterministic-inference", TERSE,
    "--enable-return-hidden-states", "--enable-metrics", *PARSERS["sglang"],
)  # fmt: skip
TOKENS = 24


def running(*flags: str, **env: str) -> Iterator[Forked]:
    server = Forked(SHIPPED, *FLAGS, *flags, env=env).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def off() -> Iterator[Forked]:
    """Without NEXTN."""
    yield from running()


@pytest.fixture(scope="module")
def never() -> Iterator[Forked]:
    """With NEXTN; no step drafts."""
    yield from running(*NEXTN, "3", TEST_DRAFTS="0")


@pytest.fixture(scope="module")
def switching() -> Iterator[Forked]:
    """With NEXTN; the number of drafts is another one in each step, and of each request."""
    yield from running(*NEXTN, "3", TEST_DRAFTS="0,3,102,0,0,2,0231")


def ask(
    server: Forked,
    *,
    params: dict[str, Any] | None = None,
    each: Sequence[dict[str, Any]] = ({},) * len(PROMPTS),
    **options: Any,
) -> list[Any]:
    """The answers to all prompts at once; each has a seed of its own."""
    params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True} | (params or {})
    own = [params | one | {"sampling_seed": 7 + i} for i, one in enumerate(each)]
    return server.post("/generate", text=PROMPTS, sampling_params=own, **options)


def token_ids(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


SAMPLED = {
    "greedy": {},
    "temperature": {"temperature": 1},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "top_k": {"temperature": 0.9, "top_k": 20, "top_p": 0.95},
}
ENDS = {"ignore_eos": False, "stop_token_ids": [*range(1, 999)]}
PENALISED = {
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.2, "temperature": 1},
    "additive": {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    "repetition": {"repetition_penalty": 1.3},
    "repetition, sampled": {"repetition_penalty": 1.3, "temperature": 1},
    "least tokens": {"min_new_tokens": 20} | ENDS,
    "least tokens, repetition": {"min_new_tokens": 24, "repetition_penalty": 1.1} | ENDS,
    "logit_bias": {"logit_bias": {"5": 4.0, "77": 6.0}, "temperature": 1},
    "logit_bias, frequency": {"logit_bias": {"5": 9.0, "77": 9.0}, "frequency_penalty": 0.9},
}


@pytest.mark.parametrize("case", SAMPLED)
def test_a_seed_gives_the_same_text(off, never, switching, case):
    wanted = token_ids(ask(off, params=SAMPLED[case]))
    assert token_ids(ask(never, params=SAMPLED[case])) == wanted
    found = ask(switching, params=SAMPLED[case])
    assert token_ids(found) == wanted
    assert sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in found) > 0


@pytest.mark.parametrize("case", PENALISED)
def test_penalties_are_those_without_drafts(off, never, switching, case):
    """They count each draft before the token that they change."""
    wanted = token_ids(ask(off, params=PENALISED[case]))
    assert token_ids(ask(never, params=PENALISED[case])) == wanted
    found = ask(switching, params=PENALISED[case])
    assert token_ids(found) == wanted
    # A draft may be a token that ends the answer too early: then none need be right.
    seen = "spec_verify_ct" if "min_new_tokens" in PENALISED[case] else "spec_num_correct_drafts"
    assert sum(answer["meta_info"][seen] for answer in found) > 0


def test_each_request_of_a_batch_has_its_own_penalties(off, switching):
    each = [PENALISED[case] for case in islice(cycle(PENALISED), len(PROMPTS))]
    assert token_ids(ask(switching, each=each)) == token_ids(ask(off, each=each))


@pytest.mark.parametrize("temperature", [0, 1])
def test_logprobs(off, never, switching, temperature):
    """Of the tokens, of the likeliest and of those that were named."""
    names = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")
    options = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [5, 9]}
    options["params"] = {"temperature": temperature}

    def rows(server: Forked, name: str) -> list[Any]:
        """(log-probability, token) of all answers in one list."""
        found = [answer["meta_info"][name] for answer in ask(server, **options)]
        flat = [entry for answer in found for entry in answer]
        return flat if name == names[0] else [pair for entry in flat for pair in entry]

    for name in names:
        wanted = rows(off, name)
        for server in (never, switching):
            found = rows(server, name)
            assert [pair[1] for pair in found] == [pair[1] for pair in wanted]
            assert [pair[0] for pair in found] == pytest.approx([p[0] for p in wanted], abs=1e-3)


def test_hidden_states(off, never, switching):
    """One for each token but the last."""

    def rows(server: Forked) -> list[list[float]]:
        found = ask(server, return_hidden_states=True)
        parts = [state for answer in found for state in answer["meta_info"]["hidden_states"]]
        return [row for part in parts for row in (part if isinstance(part[0], list) else [part])]

    wanted = rows(off)
    for server in (never, switching):
        found = rows(server)
        assert len(found) == len(wanted)
        for row, other in zip(found, wanted, strict=True):
            assert row == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_a_json_schema(off, never, switching, temperature):
    params = {"temperature": temperature, "max_new_tokens": 200, "json_schema": json.dumps(SCHEMA)}
    params["ignore_eos"] = False
    wanted = token_ids(ask(off, params=params))
    for server in (never, switching):
        assert token_ids(ask(server, params=params)) == wanted
        follow_a_schema(server, temperature)


def test_stop_strings_end_answers_where_they_do_without_drafts(off, switching):
    """Also where two are in adjacent tokens, or one follows a stop token."""
    answers = ask(off, return_logprob=True, return_text_in_logprobs=True)
    tokens = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    for place in range(5, TOKENS - 1, 4):
        pairs = [(row[place], row[place + 1]) for row in tokens]
        strings = [{"stop": [after, at]} for (_, _, at), (_, _, after) in pairs]
        both = [{"stop": [after], "stop_token_ids": [at]} for (_, at, _), (_, _, after) in pairs]
        for each in (strings, both):
            wanted, found = (
                [
                    (answer["text"], answer["output_ids"], answer["meta_info"]["finish_reason"])
                    for answer in ask(server, params={"ignore_eos": False}, each=each)
                ]
                for server in (off, switching)
            )
            assert found == wanted


@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_p": 0.9}], ids=str)
def test_least_tokens_that_a_grammar_lacks_end_the_answer(off, never, switching, params):
    params = {"temperature": 1, "regex": "a", "min_new_tokens": 6, "ignore_eos": False} | params
    for server in (off, never, switching):
        assert [answer["text"] for answer in ask(server, params=params)] == ["a"] * len(PROMPTS)


@pytest.mark.parametrize("regex", ["a", "(ab)?c{0,3}"])
def test_an_answer_ends_with_its_grammar(off, never, switching, regex):
    """Also where its end would be ignored, and behind a prompt."""
    params = {"temperature": 1, "regex": regex}
    answers = [ask(server, params=params) for server in (off, never, switching)]
    for answer in (each for found in answers for each in found):
        assert re.fullmatch(regex, answer["text"])
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert len(answer["output_ids"]) <= 6
    assert len({str(token_ids(found)) for found in answers}) == 1


def test_min_p_is_refused_beside_seeds(off, switching):
    """SGLang's sampler would end the server."""
    params = {"temperature": 1, "min_p": 0.1, "max_new_tokens": 4}
    for server in (off, switching):
        status, text = post(server, "/generate", {"text": "a", "sampling_params": params})
        assert (status, "min_p is 0.1; with --enable-deterministic" in text) == (400, True)


def test_dialogues_with_tools_are_right_and_the_same(off, switching, size):
    """Calls, thoughts and answers, whole and in a stream."""
    held, streamed = (dialogues(off, size(3, 36), stream=stream) for stream in (False, True))
    check_dialogues(held, streamed)
    for stream in (False, True):
        assert dialogues(switching, len(held), stream=stream) == held


def test_steps_are_plain_where_nothing_is_drafted(never, switching):
    """The tests above have run on both."""

    def steps(server: Forked) -> dict[str, float]:
        return server.by_label("sglang:qwen3next_steps_total", "kind")

    assert steps(never)["plain"] > 0
    assert steps(never).get("verify", 0) == 0
    assert min(steps(switching).values()) > 0
