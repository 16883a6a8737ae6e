"""No client ends an SGLang server: what would is refused, and who leaves leaves nothing behind."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, TOKENS, complete, eventually, hang_up
from engines.hostile import COMPLETIONS, LOGPROBS, PROMPT, V, ask, fields, leave, soak
from engines.sglang.server import FIXED, NEXTN, Forked
from qwen3next_plugin.extras.host_fixes import processes

pytestmark = pytest.mark.serve

TOP, POOL = "top_logprobs_num", "token_indices_to_pool"
SCORE = {"input_ids": [1, 2], "return_logprob": True, "sampling_params": {"max_new_tokens": 0}}
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
    "token beside a text": ({"text": "a", "input_ids": [1, V]}, f"{PROMPT} is {V}"),
    "no token beside a text": ({"text": "a", "input_ids": []}, f"{PROMPT} is empty"),
    "labels": (
        {"custom_labels": {"x": "y"}},
        "custom_labels has 'x'; allowed are the names of the server's --tokenizer-metrics-allowed",
    ),
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
    "logprobs of a long prompt": (
        {"input_ids": [5] * 3000, "return_logprob": True, TOP: 1000, "logprob_start_len": 0},
        f"{LOGPROBS} or token_ids_logprob asks for 3011008 log-probabilities",
    ),
    "logprobs of prompts": (
        {"input_ids": [[5] * 600] * 2, "return_logprob": True, TOP: 1000, "logprob_start_len": 0},
        "a request may have",
    ),
    "logprobs of answers": (
        {
            "return_logprob": True,
            TOP: 20,
            "sampling_params": {"max_new_tokens": 3000, "n": 128},
        },
        f"{LOGPROBS} or token_ids_logprob asks for 8064000 log-probabilities",
    ),
    "the address of no server": (
        {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0},
        "bootstrap_host 2.2.2.2 is SGLang's own; name a prefill server",
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
    "logprobs from before the prompt": (
        {"return_logprob": True, "logprob_start_len": -2},
        "logprob_start_len is -2; allowed are -1 to",
    ),
    "a list of starts": (
        {"return_logprob": True, "logprob_start_len": [0]},
        "logprob_start_len is [0]: Expected `int`, got `array`",
    ),
    "a list of numbers of logprobs": (
        {"return_logprob": True, TOP: [2]},
        f"{TOP} is [2]: Expected `int`, got `array`",
    ),
    "a list of hidden states": (
        {"return_hidden_states": [False]},
        "return_hidden_states is [False]: Expected `bool | str`, got `array`",
    ),
    "an adapter by its number": ({"lora_id": "x"}, "lora_id is 'x'; name an adapter in lora_path"),
    "embeddings that are none": (
        {"positional_embed_overrides": 1},
        "positional_embed_overrides is 1; only /v1/score",
    ),
    "embeddings of a batch that are none": (
        {"text": ["a", "b"], "positional_embed_overrides": [1, None]},
        "positional_embed_overrides is 1; only /v1/score",
    ),
    "a session's name": (
        {"session_params": {"id": [1]}},
        "session_params.id is [1]: Expected `str | null`, got `array`",
    ),
    "a session's field": (
        {"session_params": {"id": "a", "ID": "b"}},
        "session_params has no field 'ID'; allowed are id, rid, offset",
    ),
    "position behind the prompt": (
        SCORE | {POOL: [0, 2]},
        f"{POOL} is 2; allowed are 0 to 1",
    ),
    "position before the prompt": (
        SCORE | {POOL: [-1]},
        f"{POOL} is -1; allowed are 0 to 1",
    ),
    "no position": (SCORE | {POOL: []}, f"{POOL} is empty"),
    "positions that are lists": (SCORE | {POOL: [[0]]}, f"{POOL} is [[0]]: Expected `int`"),
    "position, and an answer": (
        SCORE | {POOL: [1], "sampling_params": {"max_new_tokens": 4}},
        f"max_new_tokens is 4; with {POOL} allowed is 0",
    ),
    "position, and logprobs from behind it": (
        SCORE | {POOL: [0, 1], "logprob_start_len": 1},
        f"logprob_start_len with {POOL} is 1; allowed are -1 to 0",
    ),
    "position, with chunks and a radix cache": (
        SCORE | {POOL: [1]},
        f"{POOL} needs a server with --disable-radix-cache --chunked-prefill-size -1",
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
        processes.TOO_DEAR,
    ),
}
# What /vertex_generate is asked besides an instance, and a part of what it then says. SGLang
# compares nothing there with the type that it declares.
VERTEX: dict[str, tuple[dict[str, Any], str]] = {
    "labels of another type": ({"custom_labels": {"x": 1}}, "custom_labels is {'x': 1}: Expected"),
    "checks left out": (
        {"sampling_params": {"temperature": 0, "top_p": 0.9, "is_normalized": True}},
        "is_normalized is SGLang's own; leave it out of sampling_params",
    ),
    "stop strings": ({"sampling_params": {"stop_strs": [1]}}, "stop_strs is "),
    "most tokens": (
        {"sampling_params": {"max_new_tokens": 4.5}},
        "sampling_params.max_new_tokens is 4.5: Expected `int | null`, got `float`",
    ),
    "top_k": (
        {"sampling_params": {"top_k": "5"}},
        "top_k is '5': Expected `int`, got `str`",
    ),
    "answers": ({"sampling_params": {"n": True}}, "n is True: Expected `int`, got `bool`"),
    "bias": (
        {"sampling_params": {"logit_bias": {"5": "x"}}},
        "logit_bias is {'5': 'x'}: Expected `float`, got `str`",
    ),
    "parameters": ({"sampling_params": "x"}, "sampling_params is 'x'; allowed is an object"),
    "session": ({"session_params": "x"}, "session_params is 'x'; allowed is an object"),
    "logprobs": (
        {"return_logprob": True, TOP: 1.5},
        f"{TOP} is 1.5: Expected `int`, got `float`",
    ),
    "start of logprobs": (
        {"return_logprob": True, "logprob_start_len": "a"},
        "logprob_start_len is a; allowed are -1 to",
    ),
    "name of the request": ({"rid": [5]}, "rid is 5: Expected `str | null`, got `int`"),
    "name of a session": ({"session_id": [5]}, "session_id is [5]: Expected `str | null`"),
    "time": ({"received_time": "x"}, "received_time is 'x': Expected `float | null`, got `str`"),
}

REMOTE = {"master_address": "127.0.0.1", "group_name": "nope"}
# What a scheduler is asked for and cannot do, and a part of what is then answered.
CONTROLS: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        f"{action} a record of experts": (
            f"/{action}_expert_distribution_record",
            {},
            "Please set ServerArgs.expert_distribution_recorder_mode",
        )
        for action in ("start", "stop", "dump")
    },
    **{
        f"a profile of {activity}": ("/start_profile", {"activities": [activity]}, says)
        for activity, says in {
            "MEM": "_cuda_record_memory_history",
            "GPU": "No activities specified",
            "CUDA_PROFILER": "not compiled with CUDA",
            "RPD": "rpdTracerControl",
        }.items()
    },
    "weights to an unknown group": (
        "/send_weights_to_remote_instance",
        REMOTE | {"ports": "1"},
        "KeyError: 'nope_1_0'",
    ),
    "weights to two ranks": (
        "/send_weights_to_remote_instance",
        REMOTE | {"ports": "1,2"},
        "Expected 1 ports, but got 2",
    ),
    "a sleep beyond time": (
        "/slow_down",
        {"forward_sleep_time": 1e300},
        "forward_sleep_time is 1e+300; allowed are -inf to 60",
    ),
    "a level of the log": (
        "/configure_logging",
        {"log_requests": True, "log_requests_level": 99},
        "Invalid --log-requests-level",
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    # fp32, so that an answer does not hang on which other requests share a step with it.
    flags = ("--dtype", "float32", "--max-total-tokens", "32768", "--enable-metrics")
    always = ("--decode-log-interval", "1")  # metrics of every step
    more = ("--enable-streaming-session",)
    server = Forked(SHIPPED, *NEXTN, "3", *flags, *always, *more, env=FIXED).wait()
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


@pytest.mark.parametrize("case", VERTEX)
def test_a_hostile_prediction_is_refused(server, first, case):
    parameters, says = VERTEX[case]
    body = {"instances": [{"text": PROMPTS[0]}], "parameters": parameters}
    status, text = ask(server, "/vertex_generate", body)
    assert status == 400
    assert says in text


def test_an_honest_prediction_is_answered(server, first):
    params = {"temperature": 0, "max_new_tokens": TOKENS, "stop": ["zz"], "stop_token_ids": [4]}
    body = {"instances": [{"text": PROMPTS[0]}], "parameters": {"sampling_params": params}}
    (answer,) = server.post("/vertex_generate", **body)["predictions"]
    assert answer["text"] == first[PROMPTS[0]]


@pytest.mark.parametrize("start", [0, 2])
def test_a_streaming_session_answers_as_one_text_does(server, first, start):
    """Its next turn begins behind a verification, whose last token no step has read."""

    def ask_for(tokens: int, ids: list[int], **more: Any) -> list[int]:
        params = {"temperature": 0, "max_new_tokens": tokens, "stop_token_ids": [*range(250, 290)]}
        return server.post("/generate", input_ids=ids, sampling_params=params, **more)["output_ids"]

    session = server.post("/open_session", capacity_of_str_len=10_000, streaming=True)
    text: list[int] = []
    for turn in range(4):
        asked = [(31 * start + 7 * turn + 5 * i) % 4000 + 3 for i in range(5 + start)]
        answer = ask_for(12 + 3 * turn, asked, session_params={"id": session})
        text += asked
        assert answer == ask_for(12 + 3 * turn, text)
        text += answer
    ask(server, "/close_session", {"session_id": session})


def turn(server: Forked, session: str, ids: list[int], tokens: int) -> tuple[int, str]:
    """The status and text of a session's turn."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": tokens}
    place = {"session_params": {"id": session}, "sampling_params": params}
    return ask(server, "/generate", {"input_ids": ids} | place)


def test_a_turn_without_a_token_to_read_is_refused(server, first):
    """It may go on with an answer, of which no step has read the last token."""
    prompt = [*range(5, 25)]  # more than the state could go back
    session = server.post("/open_session", capacity_of_str_len=10_000, streaming=True)
    assert turn(server, session, prompt, 0)[0] == 200
    status, text = turn(server, session, [], 4)
    assert (status, "last turn has no answer to continue" in text) == (400, True)
    answers = [turn(server, session, *asked) for asked in (([8], 4), ([], 4))]
    assert [status for status, _ in answers] == [200, 200]
    found = [token for _, text in answers for token in json.loads(text)["output_ids"]]
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 8}
    alone = server.post("/generate", input_ids=[*prompt, 8], sampling_params=params)
    assert found == alone["output_ids"]
    ask(server, "/close_session", {"session_id": session})


def test_turns_of_a_streaming_session_do_not_run_together(server, first):
    """However many are refused meanwhile."""
    session = server.post("/open_session", capacity_of_str_len=10_000, streaming=True)
    with ThreadPoolExecutor() as pool:
        runs = pool.submit(turn, server, session, [5, 6, 7], 1500)
        assert eventually(lambda: server.unfinished() == 1)
        for _ in range(3):
            status, text = turn(server, session, [8], 4)
            assert (status, "already has an active request" in text) == (400, True)
        assert not runs.done()
        status, text = runs.result()
        assert (status, len(json.loads(text)["output_ids"])) == (200, 1500)
    assert turn(server, session, [8], 4)[0] == 200
    ask(server, "/close_session", {"session_id": session})


@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_session_answers_as_one_text_does(server, first, start):
    """Drafts that were accepted behind a stop token are no part of its next turn."""
    params = {"temperature": 0, "max_new_tokens": 24, "stop_token_ids": [*range(250, 330)]}

    def ask_for(ids: list[int], **more: Any) -> dict[str, Any]:
        return server.post("/generate", input_ids=ids, sampling_params=params, **more)

    session = server.post("/open_session", capacity_of_str_len=10_000)
    text: list[int] = []
    last = None
    for turn in range(6):
        asked = [(31 * start + 7 * turn + 5 * i) % 4000 + 3 for i in range(5 + start)]
        text += asked
        answer = ask_for(asked, session_params={"id": session, "rid": last})
        alone = ask_for(text)
        assert answer["output_ids"] == alone["output_ids"]
        assert answer["meta_info"]["prompt_tokens"] == alone["meta_info"]["prompt_tokens"]
        text += answer["output_ids"]
        last = answer["meta_info"]["id"]
    ask(server, "/close_session", {"session_id": session})


def test_a_request_replaces_earlier_ones_of_its_session(server, first):
    """All of them, or those that follow one of them, two of which have the same name."""
    session = server.post("/open_session", capacity_of_str_len=10_000)
    params = {"temperature": 0, "max_new_tokens": 4}

    def ask_for(name: str, **more: Any) -> int:
        """The length of its prompt."""
        place = {"id": session} | more
        asked = {"text": PROMPTS[0], "rid": name, "sampling_params": params}
        return server.post("/generate", **asked, session_params=place)["meta_info"]["prompt_tokens"]

    alone = ask_for("a")
    for after in ("a", "b", "b"):
        behind = ask_for("b", rid=after)
    assert behind > ask_for("c", rid="a", replace=True) > alone
    status, text = ask(
        server, "/generate", {"text": "a", "session_params": {"id": session, "rid": "b"}}
    )
    assert (status, "Invalid request session id" in text) == (400, True)
    assert ask_for("d", replace=True) == alone
    ask(server, "/close_session", {"session_id": session})


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9}], ids=str)
def test_least_tokens_that_a_grammar_lacks_end_the_answer(server, first, params):
    """Not the server, where no token is left to sample from."""
    params = {"temperature": 1, "regex": "a", "min_new_tokens": 6} | params
    answer = server.post("/generate", text=PROMPTS[0], sampling_params=params)
    assert answer["text"] == "a"


def test_least_tokens_where_all_end_the_answer_end_no_server(server, first):
    """From the first token on, which no verification samples."""
    params = {"temperature": 1, "top_p": 0.9, "max_new_tokens": 4, "min_new_tokens": 1}
    params["stop_token_ids"] = [*range(V)]
    answer = server.post("/generate", text=PROMPTS[0], sampling_params=params)
    assert len(answer["output_ids"]) == 1


def test_who_leaves_ends_no_request_whose_name_begins_alike(server, first):
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 1500}
    asked = {"text": PROMPTS[0], "rid": "job-12", "sampling_params": params}
    with ThreadPoolExecutor() as pool:
        other = pool.submit(server.post, "/generate", **asked)
        assert eventually(lambda: server.unfinished() == 1)
        body = asked | {"rid": "job-1", "stream": True}
        with httpx.stream("POST", f"{server.address}/generate", json=body) as response:
            next(response.iter_lines())
        assert eventually(lambda: server.unfinished() == 1)
        assert not other.done()
        assert other.result()["meta_info"]["completion_tokens"] == 1500
    check_unharmed(server, first)


@pytest.mark.parametrize("case", CONTROLS)
def test_a_control_message_that_fails_is_answered(server, first, case):
    path, body, says = CONTROLS[case]
    status, text = ask(server, path, body)
    assert (status, says in text) == (400, True), text


@pytest.mark.parametrize("steps", [{}, {"num_steps": 1}, {"profile_by_stage": True}], ids=str)
def test_a_profile_that_cannot_be_written_is_over(server, first, steps):
    """Also where it begins or ends in a later step."""
    body = {"activities": ["CPU"], "output_dir": "/proc/nowhere"} | steps
    assert ask(server, "/start_profile", body)[0] == 200
    assert complete(server, PROMPTS[0]) == first[PROMPTS[0]]
    if not steps:
        status, text = ask(server, "/stop_profile", {})
        assert (status, "No such file or directory: '/proc/nowhere'" in text) == (400, True)
    assert ask(server, "/stop_profile", {})[0] == 500  # none is in progress


def test_memory_is_not_released_while_a_request_runs(server, first):
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 1500}
    with ThreadPoolExecutor() as pool:
        runs = pool.submit(server.post, "/generate", text=PROMPTS[0], sampling_params=params)
        assert eventually(lambda: server.unfinished() == 1)
        status, text = ask(server, "/release_memory_occupation", {})
        assert (status, "only when server is idle" in text) == (400, True)
        assert not runs.done()
        assert runs.result()["meta_info"]["completion_tokens"] == 1500
    assert eventually(lambda: server.unfinished() == 0)
    for path in ("resume", "release", "resume", "resume"):
        assert ask(server, f"/{path}_memory_occupation", {"tags": ["kv_cache"]})[0] == 200


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
    made = soak(server, first, clients=64, each=40)
    assert min(made[kind] for kind in ("honest", "hostile", "malformed", "aborted")) > 100
    check_unharmed(server, first)
