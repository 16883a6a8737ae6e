"""One server of the shipped checkpoint with MTP and default flags, asked by real clients."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from statistics import median

import openai
import pytest

from checkpoints import SHIPPED
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
from engines.figures import check_drafts, check_log, check_pages, check_shown, drafts
from engines.hostile import COMPLETIONS, ask, fields, soak
from engines.vllm.server import Server
from needs import needs

pytestmark = pytest.mark.serve

DRAFTS = '{"method": "qwen3_next_mtp", "num_speculative_tokens": 3}'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Not forked: at SIGTERM vLLM looks for another process that listens where it did. A forked
    # engine would have its socket, and be found dead now and then, which vLLM does not expect.
    # fp32, so that an answer does not hang on which other requests share a step with it.
    flags = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
    often = {"VLLM_LOG_STATS_INTERVAL": "0.5"}
    server = Server(SHIPPED, "--speculative-config", DRAFTS, *flags, env=often).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def sequential(server) -> dict[str, str]:
    """Greedy answers, one request at a time."""
    return {prompt: complete(server, prompt) for prompt in PROMPTS}


def test_healthy_and_listed(server):
    assert server.healthy()
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_one_bar_of_trunk_and_mtp_layer(server):
    log = server.process.text()
    assert log.count(" MiB of weights in ") == 1
    assert "Loading weights took" in log  # as vLLM says, so its loader has run
    assert "checkpoint shards" not in log


def test_repeated_and_served_from_the_cache(server, sequential):
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


@needs("huge-pages")
def test_memory_is_in_huge_pages(server):
    assert server.huge_bytes()


def test_streaming_is_the_same_text(server, sequential):
    assert streamed(server, PROMPTS[1]) == sequential[PROMPTS[1]]


def test_chat(server):
    messages = [{"role": "user", "content": "Write a function."}]
    whole = chat(server, messages)
    assert whole.usage.completion_tokens <= 24
    assert streamed_chat(server, messages) == whole.choices[0].message.content


def test_readmes_question(server):
    check_readmes_question(server)


def test_the_second_turn_of_a_chat_hits_the_cache(server):
    """Under default flags, that is by whole blocks; and the answer is that of a cold run."""
    first = [{"role": "user", "content": "x = [1, 2, 3]\n" * 150}]
    answer = chat(server, first)
    second = next_turn(first, answer, "And the other way round?")
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    warm = chat(server, second)
    hits = server.metrics()["vllm:prefix_cache_hits_total"] - before
    assert hits > answer.usage.prompt_tokens / 2
    # A salt of its own: nothing that others left in the cache is found.
    cold = chat(server, second, extra_body={"cache_salt": "cold"})
    assert server.metrics()["vllm:prefix_cache_hits_total"] - before == hits
    assert warm.choices[0].message.content == cold.choices[0].message.content


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


def test_32_clients_at_once_get_the_sequential_answers(server, sequential):
    assert at_once(server, PROMPTS * 4) == [sequential[prompt] for prompt in PROMPTS * 4]


def test_aborted_streams_leave_no_trace(server, sequential):
    for prompt in PROMPTS:
        hang_up(server, prompt)
    assert eventually(lambda: server.metrics()["vllm:num_requests_running"] == 0)
    assert server.healthy()
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


def test_bad_requests_are_refused_and_harm_nothing(server, sequential):
    with pytest.raises(openai.BadRequestError):
        complete(server, PROMPTS[0], tokens=100_000)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="another", prompt="x")
    assert complete(server, PROMPTS[0]) == sequential[PROMPTS[0]]


def test_hostile_requests_are_refused_and_harm_nothing(server, sequential):
    for case, (body, _) in COMPLETIONS.items():
        status, text = ask(server, "/v1/completions", fields(server, **body))
        assert status == 400, (case, text)
    assert complete(server, PROMPTS[0]) == sequential[PROMPTS[0]]


def test_64_clients_of_all_kinds_do_not_harm_the_server(server, sequential, size):
    made = soak(server, sequential, clients=64, each=size(10, 40))
    assert min(made[kind] for kind in ("honest", "hostile", "malformed", "aborted")) > 100
    names = ("num_requests_running", "num_requests_waiting", "qwen3next_state_pages")
    assert eventually(lambda: not any(server.metrics()[f"vllm:{name}"] for name in names))
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


Gain = dict[str, float]


def gained(server: Server, prompts: list[str], enough: Callable[[Gain], bool] = bool) -> Gain:
    """What each metric gains while the prompts are completed, one after the other.

    Again and again until that is `enough`: how much is drafted depends on how fast steps are.
    """
    before, gain = server.metrics(), {}

    def ask() -> bool:
        for prompt in prompts:
            complete(server, prompt, extra_body={"ignore_eos": True})
        gain.update((name, n - before.get(name, 0)) for name, n in server.metrics().items())
        return enough(gain)

    assert eventually(ask)
    return gain


def accepts(gain: Gain) -> bool:
    return gain["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_metrics_count_drafts_and_requests(server):
    gain = gained(server, PROMPTS[:2], accepts)
    assert gain["vllm:request_success_total"] % 2 == 0
    assert gain["vllm:generation_tokens_total"] == 48 * gain["vllm:request_success_total"] > 0


def test_metrics_agree_with_the_hosts_and_with_each_other(server):
    began = time.monotonic()
    gain = gained(server, PROMPTS, accepts)
    seconds = time.monotonic() - began
    ours = {
        name.removeprefix("vllm:qwen3next_"): value
        for name, value in gain.items()
        if name.startswith("vllm:qwen3next_")
    }
    # a draft is a draft, a token a token
    assert ours["draft_length_sum"] == gain["vllm:spec_decode_num_draft_tokens_total"] > 0
    answers = gain["vllm:request_success_total"]
    steps = answers * 47 - gain["vllm:spec_decode_num_accepted_tokens_total"]
    # the last step of an answer may accept more than the answer has room for
    assert steps <= ours["draft_length_count"] == ours["steps_total"] <= steps + 3 * answers
    # time is spent once
    assert 0 < ours["seconds_total"] < seconds
    kinds = server.by_label("vllm:qwen3next_seconds_total", "kind")
    assert kinds.keys() == {"plain", "verify", "draft", "catch_up"}
    assert all(kinds.values())
    assert eventually(lambda: server.metrics()["vllm:qwen3next_state_pages"] == 0)


def test_draft_lengths_and_skipped_drafts(server):
    """What is skipped is a prompt or has no draft, and is caught up with at most once."""
    before = server.by_label("vllm:qwen3next_draft_length_bucket", "le")
    gain = gained(server, PROMPTS, accepts)
    after = server.by_label("vllm:qwen3next_draft_length_bucket", "le")
    assert list(after) == ["0.0", "1.0", "2.0", "3.0", "+Inf"]
    assert list(after.values()) == sorted(after.values())
    new = {bound: after[bound] - before[bound] for bound in after}
    assert new["+Inf"] - new["0.0"] == gain["vllm:spec_decode_num_drafts_total"] > 0
    caught_up, skipped = (
        gain[f"vllm:qwen3next_{name}_total"] for name in ("tokens_caught_up", "drafts_skipped")
    )
    # a skipped step commits up to four tokens; the step after it may draft, or skip as well
    assert 0 <= caught_up <= gain["vllm:prompt_tokens_total"] + 4 * skipped


def test_estimates_are_near_what_was_measured(server):
    gains = [gained(server, PROMPTS[:3]) for _ in range(3)]
    # what acceptance is: test_acceptance_watch.py, where it is far from what is assumed at first
    assert server.by_label("vllm:qwen3next_acceptance", "position").keys() == {"1", "2", "3"}
    step = server.by_label("vllm:qwen3next_expected_step_seconds", "drafts")
    assert list(step) == ["0", "1", "2", "3"]
    # of three means, so that one may be of a machine that stalled
    mean = median(
        gain["vllm:qwen3next_seconds_total"] / gain["vllm:qwen3next_steps_total"] for gain in gains
    )
    assert mean / 5 < min(step.values()) <= max(step.values()) < 5 * mean
    assert len(server.by_label("vllm:qwen3next_expected_draft_seconds", "drafts")) == 3


def test_counts_of_drafts_agree_with_the_answers(server):
    check_drafts(server, "vllm", num_drafts=3)


def test_accepted_drafts_are_the_hosts(server):
    """While nobody hangs up: vLLM does not count the last step of those who did."""

    def accepted() -> tuple[list[float], list[float]]:
        theirs = server.by_label("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position")
        return list(drafts(server, "vllm")["accepted"].values()), list(theirs.values())

    def more(new: list[float], old: list[float]) -> list[float]:
        return [a - b for a, b in zip(new, old, strict=True)]

    before = accepted()
    gained(server, PROMPTS, lambda _: all(more(accepted()[0], before[0])))
    ours, theirs = map(more, accepted(), before)
    assert ours == theirs
    assert min(ours) > 0


def test_one_page_a_request_and_layer_while_it_runs(server):
    check_pages(server, "vllm")


def test_dashboard_and_watch_find_what_they_show(server):
    check_shown(server, "vllm", num_drafts=3)


def test_a_line_of_metrics_in_the_log(server):
    check_log(server)


# The last: what it ends is the server of all others.
def test_sigterm_while_a_request_runs(server):
    """It exits with 0, as without a request: only an engine that fails is a failure."""
    endless = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    stream = server.client.completions.create(
        model=server.model, prompt=[1, 2, 3], stream=True, **endless
    )
    next(iter(stream))
    with server.ends_cleanly():
        os.kill(server.process.child.pid, signal.SIGTERM)
