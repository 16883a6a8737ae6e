"""One server of the shipped checkpoint with MTP and default flags, asked by real clients."""

import asyncio
import math
import time
from collections.abc import Iterator

import openai
import pytest

from checkpoints import SHIPPED
from engines.vllm.server import Server

pytestmark = pytest.mark.serve

DRAFTS = '{"method": "qwen3_next_mtp", "num_speculative_tokens": 3}'
PROMPTS = [
    "import os\n",
    "def add(a, b):\n    return ",
    "class Reader:\n    def __init__(self, path):\n",
    "for i in range(10):\n    print(",
    "if __name__ == '__main__':\n",
    '"""Read a file and return its lines."""\n',
    "x = [1, 2, 3]\nfor value in x:\n",
    "try:\n    value = int(text)\nexcept ",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # fp32, so that an answer does not hang on which other requests share a step with it.
    flags = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")
    server = Server(SHIPPED, "--speculative-config", DRAFTS, *flags).wait()
    yield server
    server.close()


def complete(server: Server, prompt: str, tokens: int = 48, **options) -> str:
    answer = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=tokens, temperature=0, **options
    )
    return answer.choices[0].text


@pytest.fixture(scope="module")
def sequential(server) -> dict[str, str]:
    """Greedy answers, one request at a time."""
    return {prompt: complete(server, prompt) for prompt in PROMPTS}


def test_healthy_and_listed(server):
    assert server.healthy()
    assert [model.id for model in server.client.models.list()] == [server.model]


def test_repeated_and_served_from_the_cache(server, sequential):
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


def test_streaming_is_the_same_text(server, sequential):
    stream = server.client.completions.create(
        model=server.model, prompt=PROMPTS[1], max_tokens=48, temperature=0, stream=True
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(choice.text for choice in chunks) == sequential[PROMPTS[1]]
    assert chunks[-1].finish_reason in ("length", "stop")


def test_chat(server):
    messages = [{"role": "user", "content": "Write a function."}]
    options = {"model": server.model, "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = server.client.chat.completions.create(**options)
    assert whole.usage.completion_tokens <= 24
    stream = server.client.chat.completions.create(**options, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed == whole.choices[0].message.content


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
    usage = [
        server.client.completions.create(
            model=server.model, prompt=PROMPTS[3], max_tokens=n, temperature=0
        ).usage.completion_tokens
        for n in range(1, 7)
    ]
    assert usage == list(range(1, 7))


def test_32_clients_at_once_get_the_sequential_answers(server, sequential):
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await client.completions.create(
            model=server.model, prompt=prompt, max_tokens=48, temperature=0
        )
        return answer.choices[0].text

    async def all_at_once() -> list[str]:
        url = f"{server.address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS * 4))

    assert asyncio.run(all_at_once()) == [sequential[prompt] for prompt in PROMPTS * 4]


def test_aborted_streams_leave_no_trace(server, sequential):
    for prompt in PROMPTS:
        stream = server.client.completions.create(
            model=server.model,
            prompt=prompt,
            max_tokens=2000,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 60
    while server.metrics()["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics()["vllm:num_requests_running"] == 0
    assert server.healthy()
    assert {prompt: complete(server, prompt) for prompt in PROMPTS} == sequential


def test_bad_requests_are_refused_and_harm_nothing(server, sequential):
    with pytest.raises(openai.BadRequestError):
        complete(server, PROMPTS[0], tokens=100_000)
    with pytest.raises(openai.NotFoundError):
        server.client.completions.create(model="another", prompt="x")
    assert complete(server, PROMPTS[0]) == sequential[PROMPTS[0]]


def test_metrics_count_drafts_and_requests(server, sequential):
    before = server.metrics()
    complete(server, PROMPTS[4])
    after = server.metrics()

    def gained(name: str) -> float:
        return after[f"vllm:{name}_total"] - before[f"vllm:{name}_total"]

    assert gained("request_success") == 1
    assert gained("spec_decode_num_draft_tokens") == 3 * gained("spec_decode_num_drafts") > 0
    assert after["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert after["vllm:generation_tokens_total"] > 0
