"""No client ends an SGLang server: what would is refused, and who leaves leaves nothing behind."""

from collections.abc import Iterator
from typing import Any

import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete, eventually, hang_up
from engines.hostile import COMPLETIONS, LOGPROBS, PROMPT, V, ask, fields, leave, soak
from engines.sglang.server import FIXED, NEXTN, Forked

pytestmark = pytest.mark.serve

TOP = "top_logprobs_num"
# What /generate is asked besides a text, and a part of what it then says.
GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "token": ({"input_ids": [1, V]}, f"{PROMPT} is {V}; allowed are 0 to {V - 1}"),
    "negative token": ({"input_ids": [1, -7]}, f"{PROMPT} is -7"),
    "token of a batch": ({"input_ids": [[1], [V]]}, f"{PROMPT} is {V}"),
    "token, two answers": (
        {"input_ids": [[1], [V]], "sampling_params": {"n": 2}},
        f"{PROMPT} is {V}",
    ),
    "token, streamed": ({"input_ids": [1, V], "stream": True}, f"{PROMPT} is {V}"),
    "no token": ({"input_ids": [[1], []]}, f"{PROMPT} is empty"),
    "no text": ({"text": ["a", ""]}, f"{PROMPT} is empty"),
    "logprobs": ({"return_logprob": True, TOP: V + 1}, f"{LOGPROBS} is {V + 1}"),
    "logprobs of the prompt": (
        {"return_logprob": True, TOP: V + 1, "logprob_start_len": 0},
        f"{LOGPROBS} is {V + 1}",
    ),
    "logprobs of a batch": (
        {"text": ["a", "b"], "return_logprob": True, TOP: [1, V + 1]},
        f"{LOGPROBS} is {V + 1}",
    ),
    "logprob of a token": (
        {"return_logprob": True, "token_ids_logprob": [V]},
        f"token_ids_logprob contains out-of-vocabulary token id {V}",
    ),
    "logprobs of many tokens": (
        {"return_logprob": True, "token_ids_logprob": [1] * 5000},
        "the length of token_ids_logprob is 5000; allowed are 0 to 1000",
    ),
    "a million answers": (
        {"sampling_params": {"n": 1_000_000}},
        "n is 1000000; allowed are 1 to 128",
    ),
    "many prompts": (
        {"input_ids": [[1]] * 5000},
        "the number of prompts is 5000; allowed are 0 to 4096",
    ),
    "top_k": ({"sampling_params": {"top_k": 2**40}}, f"top_k is {2**40}; allowed are -1 to"),
    "bias": (
        {"sampling_params": {"logit_bias": {"5": 1e39}}},
        "logit_bias is 1e+39; allowed are -1e+20 to 1e+20",
    ),
    "repetition penalty": (
        {"sampling_params": {"repetition_penalty": 1e-44}},
        "repetition_penalty is 1e-44; allowed are 1e-06 to 2",
    ),
    "invalid regex": ({"sampling_params": {"regex": "((("}}, "Failed to compile regex grammar"),
    "invalid stop_regex": (
        {"sampling_params": {"stop_regex": "((("}},
        "stop_regex '(((' is no regular expression",
    ),
    "stop_regex too large": (
        {"sampling_params": {"stop_regex": "a{4294967295}"}},
        "stop_regex 'a{4294967295}' is no regular expression",
    ),
    "stop_regex that backtracks": (
        {"sampling_params": {"stop_regex": r"([\s\S]+)+\x00", "max_new_tokens": 64}},
        "takes longer than 0.25 s to match",
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    # fp32, so that an answer does not hang on which other requests share a step with it.
    flags = ("--dtype", "float32", "--max-total-tokens", "32768", "--enable-metrics")
    always = ("--decode-log-interval", "1")  # metrics of every step
    server = Forked(SHIPPED, *NEXTN, "3", *flags, *always, env=FIXED).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def first(server) -> dict[str, str]:
    """Greedy answers before anything else was asked."""
    return {prompt: complete(server, prompt) for prompt in PROMPTS}


def in_use(server: Forked) -> tuple[float, float]:
    """State pages and KV tokens in use after the last step; what is only cached does not count."""
    metrics = server.metrics()
    return metrics["sglang:mamba_used_tokens"], metrics["sglang:kv_used_tokens"]


def check_unharmed(server: Forked, first: dict[str, str]) -> None:
    """Soon nothing runs, waits or is in use, and answers are as before."""
    assert eventually(lambda: server.unfinished() == 0)  # SGLang looks every four seconds
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == first
    assert eventually(lambda: in_use(server) == (0, 0))
    assert "leak" not in server.process.text()  # SGLang counts its pools whenever it is idle


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_hostile_completion_is_refused(server, first, case):
    body, says = COMPLETIONS[case]
    status, text = ask(server, "/v1/completions", fields(server, **body))
    assert status == 400
    assert says in text.replace('\\"', '"')


@pytest.mark.parametrize("case", ["top_logprobs", "n"])
def test_a_hostile_chat_is_refused(server, first, case):
    messages = [{"role": "user", "content": "hi"}]
    body = {"top_logprobs": {"logprobs": True, "top_logprobs": V + 1}, "n": {"n": 129}}[case]
    chat = {"model": server.model, "messages": messages, "max_tokens": 8}
    status, text = ask(server, "/v1/chat/completions", chat | body)
    assert status == 400
    assert {"top_logprobs": f"{LOGPROBS} is {V + 1}", "n": "n is 129"}[case] in text


@pytest.mark.parametrize("case", GENERATE)
def test_a_hostile_generation_is_refused(server, first, case):
    body, says = GENERATE[case]
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompt = {} if body.keys() & {"text", "input_ids"} else {"text": PROMPTS[0]}
    body = prompt | body | {"sampling_params": params | body.get("sampling_params", {})}
    status, text = ask(server, "/generate", body)
    # A stream has begun with 200 when SGLang looks at the request; its only event is the error.
    assert status == (200 if body.get("stream") else 400)
    assert '"error"' in text
    assert says in text.replace("\\\\", "\\")


@pytest.mark.parametrize("temperature", [0, 1])
def test_least_tokens_that_a_grammar_lacks_end_the_answer(server, first, temperature):
    """Not the server, where no token is left to sample from."""
    params = {"regex": "a", "min_new_tokens": 6, "temperature": temperature}
    answer = server.post("/generate", text=PROMPTS[0], sampling_params=params)
    assert answer["text"] == "a"


def test_nothing_of_that_harms_the_server(server, first):
    check_unharmed(server, first)


def test_who_hangs_up_leaves_nothing(server, first):
    seen = []
    for prompt in PROMPTS:
        hang_up(server, prompt)
        seen.append(min(in_use(server)))
    assert max(seen) > 0  # else the check would not see what it is for
    check_unharmed(server, first)


@pytest.mark.long  # how soon SGLang drops a queue hangs on what else the machine does
@pytest.mark.parametrize("many", [{"n": 128}, {"prompt": [[5, 6, 7]] * 200}], ids=["n", "prompts"])
def test_who_leaves_a_full_queue_leaves_nothing(server, first, many):
    body = fields(server, **{"max_tokens": 2000, "temperature": 1, "ignore_eos": True} | many)
    leave(server, "/v1/completions", body, seconds=2)
    assert server.unfinished() > 0
    check_unharmed(server, first)


@pytest.mark.long
def test_64_clients_of_all_kinds_do_not_harm_the_server(server, first):
    made = soak(server, first, clients=64, seconds=60)
    assert min(made[kind] for kind in ("honest", "hostile", "malformed", "aborted")) > 10
    check_unharmed(server, first)
