"""No client ends or blocks a vLLM server, and who leaves leaves nothing behind."""

import asyncio
import base64
import inspect
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.utils import compile_regex_with_timeout

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete, eventually, hang_up
from engines.hostile import COMPLETIONS, V, ask, fields, leave
from engines.vllm.server import Forked
from qwen3next_plugin.extras.host_fixes import processes
from qwen3next_plugin.extras.host_fixes.vllm import checks, grammars
from qwen3next_plugin.extras.host_fixes.vllm.params import check_params

D = json.loads((SHIPPED / "config.json").read_text())["hidden_size"]
MESSAGES = [{"role": "user", "content": "hi"}]
PAGES = "vllm:qwen3next_state_pages"
COSTLY = processes.EXCEEDED
UNKNOWN = {"type": "integer", "multipleOf": 5}  # to xgrammar, so llguidance reads the schema
PATTERN = {  # to llguidance, so outlines reads it
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "z": UNKNOWN | {"const": 5}},
    "required": ["a"],
    "patternProperties": {"^b$": {"type": "boolean"}},
    "additionalProperties": False,
}
OPTIONAL = {f"a{i}": {"type": "boolean"} for i in range(100)}
# What llguidance has no limit for: memory, time, and the stack. Then outlines: an index, and a
# regular expression, which has each optional property as often as there are others.
SCHEMAS: dict[str, dict[str, Any]] = {
    "a thousand million items": {"type": "array", "items": UNKNOWN, "minItems": 10**9},
    "many properties": {
        "type": "object",
        "properties": {f"a{i}": UNKNOWN for i in range(10_000)},
    },
    "many required properties": {
        "type": "object",
        "properties": {"a0": UNKNOWN},
        "required": [f"a{i}" for i in range(40_000)],
    },
    "a long string": PATTERN | {"properties": {"a": {"type": "string", "maxLength": 50_000}}},
    "optional properties": {
        **PATTERN,
        "properties": {f"b{i}": {"type": "object", "properties": OPTIONAL} for i in range(100)},
        "required": [],
    },
}


def schema(of: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": of}}}


def tool(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def embedded(x: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return {"prompt": None, "prompt_embeds": base64.b64encode(buffer.getvalue()).decode()}


# What is asked besides an honest request of that kind, and a part of what vLLM then says.
CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"n": 0}, "n must be at least 1"),
    "a million answers": ({"n": 1_000_000}, "n must be at most"),
    "logprobs beyond the vocabulary": ({"logprobs": True, "top_logprobs": V + 1}, "max allowed"),
    "no message": ({"messages": []}, "empty conversation"),
    "messages that are none": ({"messages": None}, ""),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "valid string"),
    "an image for a text model": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
            ]
        },
        "not a multimodal model",
    ),
    "a template": ({"chat_template": "{{ 1 / 0 }}"}, "untrusted chat template"),
    "no schema": (schema({"type": "nope"}), "Invalid type"),
    "a deep schema": (
        schema(json.loads('{"items": ' * 200 + "{}" + "}" * 200)),
        "nested too deeply",
    ),
    "a choice of no tool": (
        tool({}) | {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "does not match any of the specified `tools`",
    ),
    **{name: (schema(of), COSTLY) for name, of in SCHEMAS.items()},
}
MORE_COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"structured_outputs": {"regex": "((("}}, "Grammar error"),
    "no choice": ({"structured_outputs": {"choice": []}}, "cannot be an empty list"),
    "grammar": ({"structured_outputs": {"grammar": "root ::= x"}}, "grammar specification"),
    "two constraints": (
        {"structured_outputs": {"choice": ["a"], "regex": "a"}},
        "only use one kind of constraints",
    ),
    "no allowed token": ({"allowed_token_ids": []}, "empty"),
    "allowed token": ({"allowed_token_ids": [V]}, "out-of-vocab"),
    "empty bad word": ({"bad_words": [""]}, "cannot contain an empty string"),
    "empty stop string": ({"stop": ""}, "cannot contain an empty string"),
    "logprobs of the prompt": ({"prompt_logprobs": V + 1}, "max allowed"),
    "priority": ({"priority": 2**70}, "less than or equal"),
    "many prompts": ({"prompt": [[1]] * 5000}, "exceeds the maximum allowed count"),
    "log-probabilities": (
        {"logprobs": 20, "max_tokens": 3000, "n": 128, "temperature": 1},
        "logprobs (top_logprobs) or prompt_logprobs asks for 8064000 log-probabilities",
    ),
    "log-probabilities of the prompt": (
        {"prompt": [5] * 600, "prompt_logprobs": 20, "n": 100, "temperature": 1},
        "asks for 1260000 log-probabilities of the prompt and 100 answers",
    ),
    "bad words": (
        {"bad_words": [f"a{i}" for i in range(33)]},
        "bad_words has 33 strings; allowed are at most 32",
    ),
}
EMBEDDINGS: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings of another width": (embedded(torch.zeros(5, D + 1)), "does not match"),
    "embeddings of integers": (embedded(torch.ones(5, D, dtype=torch.int64)), "floating-point"),
    "no embedding": (embedded(torch.zeros(0, D)), "cannot be empty"),
    "embeddings without memory": (
        embedded(torch.zeros(1, 1).expand(10**9, D)),
        "would allocate",
    ),
    "embeddings that are a program": (
        {"prompt": None, "prompt_embeds": base64.b64encode(b"cos\nsystem\n(S'true'\ntR.").decode()},
        "could not be deserialized",
    ),
}
RESPONSES: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": []}, "empty conversation"),
    "negative most tokens": ({"max_output_tokens": -1}, "at least 1"),
    "a tool": ({"tools": [{"type": "code_interpreter"}]}, "validation error"),
    "effort": ({"reasoning": {"effort": "x"}}, "validation error"),
}
GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "token": ({"token_ids": [V + 1]}, "out of vocabulary"),
    "no token": ({"token_ids": []}, ""),
    "stop tokens": ({"sampling_params": {"stop_token_ids": ["x"]}}, ""),
    "stop strings": (
        {"sampling_params": {"stop": [f"x{i}" for i in range(100_000)]}},
        "stop has 100000 strings; allowed are at most 32",
    ),
    "bias": ({"sampling_params": {"logit_bias": {str(10**8): 1}}}, "out-of-vocab"),
    "negative most tokens": ({"sampling_params": {"max_tokens": -1}}, "at least 1"),
}
# None of them is a number that a model can use.
ODD_EMBEDDINGS = {
    "embeddings that are NaN": embedded(torch.full((5, D), float("nan"))),
    "embeddings that are infinite": embedded(torch.full((5, D), float("inf"))),
}
# What no validation sees: each is answered with a text.
ODD: dict[str, dict[str, Any]] = {
    "repetition penalty near zero": {"repetition_penalty": 1e-44, "temperature": 1},
    "repetition penalty without end": {"repetition_penalty": 1e30, "temperature": 1},
    "bias beyond fp32": {"logit_bias": {"5": 1e39}, "temperature": 1},
    "all tokens biased": {"logit_bias": {str(i): -100 for i in range(V)}, "temperature": 1},
    "temperature near zero": {"temperature": 1e-40},
    "top_k beyond int32": {"top_k": 2**40},
    "least tokens that a grammar lacks": {
        "structured_outputs": {"regex": "a"},
        "min_tokens": 6,
        "temperature": 1,
    },
    "a long name": {"request_id": "x" * 100_000},
}


DRAFTS = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}')


def start(*flags: str, drafts: tuple[str, ...] = DRAFTS) -> Forked:
    # fp32, so that an answer does not hang on which other requests share a step with it.
    always = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
    batch = ("--max-num-seqs", "16")
    fixed = {"QWEN3NEXT_DRAFTS": "fixed"}
    return Forked(SHIPPED, *always, *batch, *drafts, *flags, env=fixed).wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Forked]:
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    server = start("--enable-scale-out", *tools)
    yield server
    server.close()


@pytest.fixture(scope="module")
def first(server) -> dict[str, str]:
    """Greedy answers before anything else was asked."""
    return {prompt: complete(server, prompt) for prompt in PROMPTS}


def in_use(server: Forked) -> dict[str, float]:
    """What requests hold: places in the batch and the queue, KV blocks, state pages."""
    metrics = server.metrics()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return {name: metrics[name] for name in (*names, PAGES)}


def check_unharmed(server: Forked, first: dict[str, str]) -> None:
    """Soon nothing runs, waits or is in use, and answers are as before."""
    assert eventually(lambda: not any(in_use(server).values())), in_use(server)
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == first
    assert eventually(lambda: not any(in_use(server).values())), in_use(server)


def check_refused(server: Forked, path: str, body: dict[str, Any], says: str) -> None:
    status, text = ask(server, path, body)
    assert status == 400, text
    assert '"error"' in text
    assert says in text


@pytest.mark.serve
@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_hostile_completion_is_refused(server, first, case):
    check_refused(server, "/v1/completions", fields(server, **COMPLETIONS[case][0]), "")


@pytest.mark.serve
@pytest.mark.parametrize("case", MORE_COMPLETIONS)
def test_a_completion_of_this_engine_only_is_refused(server, first, case):
    body, says = MORE_COMPLETIONS[case]
    check_refused(server, "/v1/completions", fields(server, **body), says)


@pytest.mark.serve
@pytest.mark.parametrize("case", CHATS)
def test_a_hostile_chat_is_refused(server, first, case):
    body, says = CHATS[case]
    chat = {"model": server.model, "messages": MESSAGES, "max_tokens": 8}
    check_refused(server, "/v1/chat/completions", chat | body, says)


@pytest.mark.serve
@pytest.mark.parametrize("case", RESPONSES)
def test_a_hostile_response_is_refused(server, first, case):
    body, says = RESPONSES[case]
    check_refused(server, "/v1/responses", {"model": server.model, "input": "hi"} | body, says)


@pytest.mark.serve
@pytest.mark.parametrize("case", GENERATE)
def test_a_hostile_generation_is_refused(server, first, case):
    body, says = GENERATE[case]
    honest = {"model": server.model, "token_ids": [1, 2], "sampling_params": {"max_tokens": 2}}
    check_refused(server, "/inference/v1/generate", honest | body, says)


@pytest.mark.serve
@pytest.mark.parametrize(
    ("path", "of", "expected"),
    [
        ("/v1/completions", {"prompt": [[5, 6]] * 256, "logprobs": 20}, 400),
        ("/v1/completions", {"prompt": [[5, 6]] * 256, "logprobs": 20, "stream": True}, 200),
        (
            "/v1/chat/completions/batch",
            {"messages": [MESSAGES] * 256, "logprobs": True, "top_logprobs": 20},
            400,
        ),
    ],
    ids=["completion", "stream", "chat"],
)
def test_prompts_of_a_request_share_its_log_probabilities(server, first, path, of, expected):
    """A stream has begun: the refusal is an event of it."""
    asked = {"model": server.model, "temperature": 1, "max_tokens": 300} | of
    status, text = ask(server, path, asked)
    assert status == expected
    each = 21 * 300
    assert f"of which {2**20 - 2**20 // each * each} are left" in text


@pytest.mark.serve
@pytest.mark.parametrize("case", ODD)
def test_an_odd_completion_is_answered(server, first, case):
    status, text = ask(server, "/v1/completions", fields(server, **ODD[case]))
    assert status == 200, text


@pytest.mark.serve
@pytest.mark.parametrize("drafts", [DRAFTS, ()], ids=["drafts", "plain"])
def test_schemas_of_several_backends_are_answered(drafts):
    """Outlines first, by which vLLM would compile, and fail, a choice; then all at once.

    On a server of its own: vLLM keeps the backend of the first.
    """
    asked: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        (schema(PATTERN), lambda text: json.loads(text)["a"] in (True, False)),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
        (
            schema(UNKNOWN | {"minimum": 10, "maximum": 95}),
            lambda text: int(text) in range(10, 100, 5),
        ),
    ]
    server = start(drafts=drafts)

    def answer(of: dict[str, Any]) -> str:
        chat = {"model": server.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
        choices = server.post("/v1/chat/completions", **chat | of)["choices"]
        return choices[0]["message"]["content"]

    try:
        for of, right in asked:
            assert right(answer(of))
        with ThreadPoolExecutor() as clients:
            texts = clients.map(answer, [of for of, _ in asked] * 4)
            for (_, right), text in zip(asked * 4, texts, strict=True):
                assert right(text)
    finally:
        server.close()


@pytest.mark.serve
def test_nothing_of_that_harms_the_server(server, first):
    check_unharmed(server, first)


@pytest.mark.serve
def test_who_hangs_up_leaves_nothing(server, first):
    held = []
    for prompt in PROMPTS:
        hang_up(server, prompt)
        held.append(in_use(server)["vllm:kv_cache_usage_perc"])
    assert max(held) > 0  # else the check would not see what it is for
    check_unharmed(server, first)


@pytest.mark.serve
@pytest.mark.parametrize("many", [{"n": 128}, {"prompt": [[5, 6, 7]] * 200}], ids=["n", "prompts"])
def test_who_leaves_a_full_queue_leaves_nothing(server, first, many):
    body = fields(server, **{"max_tokens": 2000, "temperature": 1, "ignore_eos": True} | many)
    leave(server, "/v1/completions", body, seconds=2)
    check_unharmed(server, first)


@pytest.mark.serve
@pytest.mark.long
def test_hostile_embeddings_do_not_harm_the_server():
    """In a server of their own: with them vLLM adds a token, for which llguidance has no room."""
    server = start("--enable-prompt-embeds")
    try:
        before = {prompt: complete(server, prompt) for prompt in PROMPTS}
        for body, says in EMBEDDINGS.values():
            check_refused(server, "/v1/completions", fields(server, **body), says)
        for body in ODD_EMBEDDINGS.values():
            status, text = ask(server, "/v1/completions", fields(server, **body))
            assert status == 200, text
        # In a chat vLLM marks them by a token beyond the vocabulary.
        content = [{"type": "prompt_embeds", "data": embedded(torch.zeros(5, D))["prompt_embeds"]}]
        chat = {"model": server.model, "messages": [{"role": "user", "content": content}]}
        status, text = ask(server, "/v1/chat/completions", chat | {"max_tokens": 16})
        assert status == 200, text
        check_unharmed(server, before)
    finally:
        server.close()


BOUNDED = SimpleNamespace(
    model_config=SimpleNamespace(max_model_len=10**6, get_vocab_size=lambda: V)
)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"stop": [f"x{i}" for i in range(33)]}, "stop has 33 strings; allowed are at most 32"),
        ({"bad_words": [f"x{i}" for i in range(33)]}, "bad_words has 33 strings"),
        ({"prompt_logprobs": -1}, f"asks for {600 * (V + 1)} log-probabilities"),
        ({"logprobs": 20, "max_tokens": 50_000}, "a request may have 1048576"),
    ],
    ids=["stop", "bad words", "prompt", "answer"],
)
def test_what_a_request_asks_for_is_bounded(asked, says):
    params = SamplingParams(**asked)
    with pytest.raises(VLLMValidationError, match=says):
        check_params(None, BOUNDED, "a", {"prompt_token_ids": [5] * 600}, params)


@pytest.mark.parametrize(("logprobs", "tokens"), [(None, None), (20, 2**20 // 21)])
def test_an_answer_without_a_length_has_as_many_log_probabilities_as_fit(logprobs, tokens):
    given, prompt = SamplingParams(logprobs=logprobs, max_tokens=None), {"prompt_token_ids": [5]}
    seen = []
    check_params(
        lambda *args, **more: seen.append((args, more)), BOUNDED, "a", prompt, given, 1, x=2
    )
    ((_, name, asked, params, time), more) = seen[0]
    assert (name, asked, time, more) == ("a", prompt, 1, {"x": 2})
    assert (params.max_tokens, given.max_tokens) == (tokens, None)


def test_checks_run_two_at_once_and_few_wait(monkeypatch):
    """Each text is checked once; what is too much gets a 503, and the event loop goes on."""
    began, go_on = [], threading.Event()

    def check(outputs):
        began.append(outputs)
        assert go_on.wait(60)
        return outputs

    async def ask():
        made = checks.Checks()
        texts = [
            StructuredOutputsParams(regex=f"{i}") for i in range(checks.AT_ONCE + checks.WAITING)
        ]
        asked = [asyncio.ensure_future(made.result(each)) for each in (*texts, *texts)]
        while len(began) < checks.AT_ONCE:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(began) == checks.AT_ONCE
        other = StructuredOutputsParams(regex="other")
        with pytest.raises(GracefulHTTPError, match="try again later") as refused:
            await made.result(other)
        assert refused.value.http_status == 503
        go_on.set()
        assert await asyncio.gather(*asked) == [*texts, *texts]
        assert await made.result(other) == other
        assert began == [*texts, other]

    monkeypatch.setattr(checks, "_check", check)
    asyncio.run(ask())


@pytest.mark.serve
def test_the_server_answers_others_while_it_checks(server, first):
    """Three times as many schemas as may wait, of which each takes long to check; no error 500."""
    many = 3 * (checks.AT_ONCE + checks.WAITING)

    def check(i: int) -> int:
        of = schema({"type": "array", "items": UNKNOWN, "minItems": 2_000_000 + i})
        return ask(server, "/v1/completions", fields(server, max_tokens=1) | of)[0]

    # A check in the event loop would be over before the next is asked for: none would be refused.
    with ThreadPoolExecutor(many) as clients:
        asked = [clients.submit(check, i) for i in range(many)]
        assert any(each.result() == 503 for each in as_completed(asked))
        server.get("/health")
        assert not all(each.done() for each in asked)
    assert {each.result() for each in asked} <= {200, 400, 503}
    check_unharmed(server, first)


def thread_of_a_regex(state: dict[str, Any]) -> bool:
    """Whether vLLM compiles in the thread that asks: with a limit of time it needs another."""
    here = threading.get_ident()
    return compile_regex_with_timeout(lambda _: threading.get_ident(), "a") == here


def test_only_cpu_time_limits_what_compiles(monkeypatch):
    """vLLM's five seconds of wall time would refuse on busy cores what is allowed in quiet."""
    monkeypatch.setattr(processes, "_FIRST", {})
    processes.start(tokenizer=None)
    processes.first().call(0, grammars.tokenizer)
    assert processes.first().call(1, thread_of_a_regex)[1]


@pytest.mark.compat
def test_outlines_has_no_limit():
    """Fails when it has one for states: then look whether extras/host_fixes/processes.py can go."""
    builds = (
        "import resource, outlines_core as o\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (2, 2))\n"
        "tokens = o.Vocabulary(256, {bytes([b]): [b] for b in range(256)})\n"
        "try: o.Index('.{30000}', tokens)\n"
        "except ValueError: pass  # a limit"
    )
    assert subprocess.run([sys.executable, "-c", builds], capture_output=True).returncode


@pytest.mark.compat
def test_llguidance_has_no_limit():
    """Fails when it has one for items: then look whether extras/host_fixes/processes.py can go."""
    reads = (
        "import json, resource, sys, llguidance as l\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "l.LLMatcher.validate_grammar(l.LLMatcher.grammar_from_json_schema(sys.argv[1]), None)"
    )
    costly = json.dumps(SCHEMAS["a thousand million items"])
    assert subprocess.run([sys.executable, "-c", reads, costly], capture_output=True).returncode


@pytest.mark.compat
def test_vllm_has_one_backend():
    """Fails when it chooses one for each request: then `compile_apart` can leave that to it."""
    assert "if self.backend is None" in inspect.getsource(StructuredOutputManager.grammar_init)
