"""One server of the shipped checkpoint, by Qwen's own command, asked by real clients."""

import json
import math
import re
import textwrap
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import openai
import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED
from engines.checks import LENGTHS, TOKENS, TOLERANCE, check_greedy
from engines.clients import (
    PROMPTS,
    at_once,
    chat,
    check_readmes_question,
    complete,
    eventually,
    hang_up,
    next_turn,
    streamed,
    streamed_chat,
    usage_by_limit,
)
from engines.figures import check_drafts, check_log, check_pages, check_shown
from engines.process import WORKERS
from engines.sglang.schema import TERSE, follow_a_schema
from engines.sglang.server import FIXED, NEXTN, Server
from engines.vllm.offline import Offline
from needs import needs

pytestmark = pytest.mark.serve

READY_SECONDS = 45 * WORKERS  # starting takes more than one core
STEPS, INTERVAL = 3, 8
OTHER = Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"


def started() -> Server:
    # fp32, so that an answer does not hang on which other requests share a step with it; drafts of
    # fixed length, so that a busy machine, where they do not pay, accepts some, too.
    flags = ("--dtype", "float32", "--max-total-tokens", "32768", "--enable-metrics")
    often = ("--decode-log-interval", str(INTERVAL))
    return Server(SHIPPED, *NEXTN, str(STEPS), *flags, *often, TERSE, env=FIXED).wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = started()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sequential(server) -> dict[str, str]:
    """Greedy answers, one request at a time."""
    return {prompt: complete(server, prompt) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def source() -> list[tuple[int, ...]]:
    """Python source as prompts of many lengths."""
    text = Path(textwrap.__file__).read_text() * 2
    ids = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids
    assert len(ids) > max(LENGTHS)
    return [tuple(ids[:length]) for length in LENGTHS]


@pytest.mark.long  # it depends on how fast the machine is
def test_ready_in_time(server):
    """Or a second one is, where something else kept the cores from the first."""
    if server.start_seconds >= READY_SECONDS:
        again = started()
        again.close()
        assert again.start_seconds < READY_SECONDS


def test_says_what_was_filled_in(server):
    filled_in = "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
    assert f"qwen3next_plugin: {filled_in}, as 3 steps ask for" in server.process.text()


def test_one_bar_of_the_trunk_and_one_of_the_mtp_layer(server):
    log = server.process.text()
    assert log.count(" MiB of weights in ") == log.count("Load weight end.") == 2
    assert "loading shards" not in log


def test_healthy_and_listed(server):
    assert server.healthy()
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_the_same_as_transformers_on_the_standard_librarys_source(server, source, reference):
    logprobs = {"return_logprob": True, "logprob_start_len": 0}
    check_greedy(reference(SHIPPED), source, server.greedy(source, TOKENS, **logprobs))


@pytest.mark.long  # with every change both are compared with transformers on this source
@needs("both-venvs")
def test_the_same_as_vllm(server, source):
    """Both with drafts: the same tokens, the same log-probabilities."""
    logprobs = {"return_logprob": True, "logprob_start_len": 0}
    ours = server.greedy(source, TOKENS, **logprobs)
    engine = Offline(
        SHIPPED,
        python=str(OTHER),
        dtype="float32",
        max_model_len=8192,
        speculative_config={"method": "mtp", "num_speculative_tokens": STEPS},
    )
    try:
        theirs = engine.greedy(source, TOKENS, logprobs=0, prompt_logprobs=0)
    finally:
        engine.close()
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=TOLERANCE)


@needs("huge-pages")
def test_memory_is_in_huge_pages(server):
    assert server.huge_bytes()


def test_streaming_is_the_same_text(server, sequential):
    assert streamed(server, PROMPTS[1]) == sequential[PROMPTS[1]]


def test_the_hosts_own_interface_gives_the_same_text(server, sequential):
    params = {"temperature": 0, "max_new_tokens": 48}
    answers = server.post("/generate", text=PROMPTS, sampling_params=params)
    assert [answer["text"] for answer in answers] == list(sequential.values())


def test_chat(server):
    messages = [{"role": "user", "content": "Write a function."}]
    whole = chat(server, messages)
    assert whole.usage.completion_tokens <= 24
    assert streamed_chat(server, messages) == whole.choices[0].message.content


def test_readmes_question(server):
    check_readmes_question(server)


def test_every_turn_of_a_chat_hits_the_cache(server):
    """And the answer is that of a cold run."""
    turn = [{"role": "user", "content": "x = [1, 2, 3]\n" * 50}]
    chats = []
    for question in ("And the other way round?", "Why?", "Once more."):
        answer = chat(server, turn)
        chats.append((turn, answer))
        before = server.metrics().get("sglang:cached_tokens_total", 0)
        turn = next_turn(turn, answer, question)
        warm = chat(server, turn)
        hits = server.metrics()["sglang:cached_tokens_total"] - before
        assert hits >= answer.usage.prompt_tokens
        chats.append((turn, warm))
    for messages, warm in chats:
        server.forget()
        cold = chat(server, messages)
        assert cold.choices[0].message.content == warm.choices[0].message.content


def test_logprobs(server, sequential):
    answer = server.client.completions.create(
        model=server.model, prompt=PROMPTS[0], max_tokens=12, temperature=0, logprobs=5
    )
    logprobs = answer.choices[0].logprobs
    assert sequential[PROMPTS[0]].startswith(answer.choices[0].text)
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-4)  # greedy takes the likeliest
        assert sum(map(math.exp, top.values())) <= 1 + 1e-4


def test_stop_string_ends_the_answer_before_it(server, sequential):
    text = sequential[PROMPTS[2]]
    stop = text[len(text) // 2 :][:3]
    answer = complete(server, PROMPTS[2], stop=[stop])
    assert answer == text[: text.index(stop)]


def test_token_limit_inside_a_draft(server, sequential):
    """1 to 6 tokens: the limit falls at every place of a draft of three."""
    texts = [complete(server, PROMPTS[3], tokens=n) for n in range(1, 7)]
    assert all(sequential[PROMPTS[3]].startswith(text) for text in texts)
    assert usage_by_limit(server, PROMPTS[3], range(1, 7)) == list(range(1, 7))


def test_16_clients_at_once_get_the_sequential_answers(server, sequential):
    assert at_once(server, PROMPTS * 2) == [sequential[prompt] for prompt in PROMPTS * 2]


def test_aborted_streams_leave_no_trace(server, sequential):
    for prompt in PROMPTS:
        hang_up(server, prompt)
    assert eventually(lambda: server.unfinished() == 0)
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


@pytest.mark.parametrize("temperature", [0, 1])
def test_answers_follow_a_json_schema(server, temperature):
    follow_a_schema(server, temperature)


@pytest.mark.parametrize("least", [5, 11])
def test_the_least_number_of_tokens_is_counted_in_tokens(server, source, least):
    """An answer ends right behind it, however many tokens a step commits.

    Nearly every token ends it, and the others are the unlikeliest.
    """
    vocab_size = json.loads((SHIPPED / "config.json").read_text())["vocab_size"]
    ends = [token for token in range(vocab_size) if token % 64]
    others = {str(token): -100.0 for token in range(0, vocab_size, 64)}
    stop = {"min_new_tokens": least, "stop_token_ids": ends, "logit_bias": others}
    params = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": False} | stop
    answer = server.post("/generate", input_ids=list(source[5]), sampling_params=params)
    assert answer["meta_info"]["completion_tokens"] == least + 1


def test_updates_of_weights_are_refused_and_harm_nothing(server, sequential):
    assert refused(server, "/update_weights_from_ipc", zmq_handles={})
    assert server.post("/begin_weight_update")["success"]
    with pytest.raises(urllib.error.HTTPError, match="400"):  # no tensors came
        server.post("/end_weight_update")
    assert complete(server, PROMPTS[0]) == sequential[PROMPTS[0]]


def refused(server: Server, path: str, **body: object) -> bool:
    """Whether the answer is a 400 that names the fix."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        server.post(path, **body)
    answer = json.load(raised.value)
    return raised.value.code == 400 and "restart the server with the new" in answer["message"]


def test_bad_requests_are_refused_and_harm_nothing(server, sequential):
    with pytest.raises(openai.BadRequestError):
        complete(server, PROMPTS[0], tokens=100_000)
    assert complete(server, PROMPTS[0]) == sequential[PROMPTS[0]]


def test_metrics_and_log_agree_with_the_answers_on_what_was_accepted(server):
    prompts = [tuple(range(100, 100 + n)) for n in (20, 50, 80)]
    begun, before = len(server.process.text()), server.metrics()
    answers = [server.greedy([prompt], 300)[0] for prompt in prompts]
    after = server.metrics()
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    steps, accepted = (sum(getattr(a, name) for a in answers) for name in ("steps", "accepted"))
    assert gained["sglang:spec_verify_calls_total"] == steps
    assert gained["sglang:generation_tokens_total"] == 300 * len(prompts)
    assert 0 < accepted < STEPS * steps  # some are right, some are not
    # The first token of an answer is the prompt's; its last step may accept more than has room.
    surplus = steps + accepted - 299 * len(prompts)
    assert 0 <= surplus <= STEPS * len(prompts)

    def lines() -> list[float]:
        text = server.process.text()[begun:]
        return [float(length) for length in re.findall(r"accept len: ([\d.]+)", text)]

    def last_is_shown() -> bool:
        shown = server.metrics()["sglang:spec_accept_length"]
        return shown == pytest.approx(lines()[-1], abs=0.006)

    assert eventually(last_is_shown)  # SGLang may log a step after its answer has left
    assert len(lines()) == pytest.approx(steps / INTERVAL, abs=1)
    assert mean(lines()) == pytest.approx((steps + accepted) / steps, abs=0.1)


def test_counts_of_drafts_agree_with_the_answers(server):
    check_drafts(server, "sglang", num_drafts=STEPS)


def test_one_page_a_request_and_layer_while_it_runs(server):
    check_pages(server, "sglang")


def published(server: Server) -> dict[str, float]:
    """Our metrics when no more follow: SGLang publishes a step, one by one, after its answer."""
    seen: list[dict[str, float]] = []

    def settled() -> bool:
        ours = {name: n for name, n in server.metrics().items() if "qwen3next" in name}
        seen.append(ours)
        return len(seen) > 4 and all(each == ours for each in seen[-4:])

    assert eventually(settled)
    return seen[-1]


def test_time_is_spent_once(server):
    """Never more than has passed, and most of what the scheduler has computed."""
    complete(server, PROMPTS[0], 40, extra_body={"ignore_eos": True})
    before, computed, began = published(server), server.cpu_seconds(), time.monotonic()
    complete(server, PROMPTS[0], 400, extra_body={"ignore_eos": True})
    busiest = max(seconds - computed[pid] for pid, seconds in server.cpu_seconds().items())
    elapsed, after = time.monotonic() - began, published(server)
    gained = {name: n - before[name] for name, n in after.items()}
    steps = gained["sglang:qwen3next_draft_length_count"]
    assert gained["sglang:qwen3next_steps_total"] == steps - 1  # the first is not timed
    assert 0.7 * busiest < gained["sglang:qwen3next_seconds_total"] < elapsed
    assert 0 < after["sglang:qwen3next_longest_step_seconds"] < 60


def test_dashboard_and_watch_find_what_they_show(server):
    check_shown(server, "sglang", num_drafts=STEPS)


def test_a_line_of_metrics_in_the_log(server):
    check_log(server)
