"""What hostile and careless clients ask of a server of the shipped checkpoint, on either engine."""

import asyncio
import json
import random
import ssl
from collections import Counter
from typing import Any

import httpx

from checkpoints import SHIPPED
from engines.clients import PROMPTS, TOKENS
from engines.server import TIMEOUT_S, Server

V = json.loads((SHIPPED / "config.json").read_text())["vocab_size"]
PROMPT = "prompt (input_ids, text)"
LOGPROBS = "top_logprobs (top_logprobs_num, logprobs)"

# Each is answered with a 400: fields of a completion, and a part of what SGLang then says.
COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "token beyond the vocabulary": (
        {"prompt": [1, V]},
        f"{PROMPT} is {V}; allowed are 0 to {V - 1}",
    ),
    "token beyond int64": ({"prompt": [1, 2**63]}, f"{PROMPT} is {2**63}; allowed are 0 to"),
    "negative token": ({"prompt": [1, -1]}, f"{PROMPT} is -1; allowed are 0 to"),
    "token of a batch": ({"prompt": [[1, 2], [V + 5]]}, f"{PROMPT} is {V + 5}; allowed are 0 to"),
    "mixed prompts": ({"prompt": [[1, 2], 3]}, "prompt"),
    "no prompt": ({"prompt": ""}, "Prompt cannot be empty"),
    "no tokens": ({"prompt": [[]]}, "Prompt cannot be empty"),
    "an empty text of two": ({"prompt": ["a", ""]}, f"{PROMPT} is empty"),
    "an empty list of two": ({"prompt": [[1], []]}, f"{PROMPT} is empty"),
    "logprobs beyond the vocabulary": (
        {"logprobs": V + 1},
        f"{LOGPROBS} is {V + 1}; allowed are 0 to 1000",
    ),
    "negative logprobs": ({"logprobs": -5}, f"{LOGPROBS} is -5; allowed are 0 to"),
    "no answer": ({"n": 0}, "n is 0; allowed are 1 to 128"),
    "a million answers": ({"n": 1_000_000}, "n is 1000000; allowed are 1 to 128"),
    "biased token": ({"logit_bias": {str(V): 1}}, "logit_bias"),
    "biased text": ({"logit_bias": {"a": 1}}, "'a'"),
    "many stop strings": ({"stop": [f"x{i}" for i in range(5000)]}, "at most 32 stop strings"),
    "stop token": ({"stop_token_ids": [V]}, f"stop_token_ids is {V}; allowed are 0 to {V - 1}"),
    "least tokens and a stop token": (
        {"min_tokens": 5, "stop_token_ids": [-V - 9]},
        f"stop_token_ids is {-V - 9}; allowed are 0 to {V - 1}",
    ),
    "least above most tokens": ({"min_tokens": 50}, "min_new_tokens"),
    "negative least tokens": ({"min_tokens": -5}, "min_new_tokens"),
    "most tokens": ({"max_tokens": 2**62}, "maximum context length"),
    "negative most tokens": ({"max_tokens": -1}, "max_tokens"),
    "seed beyond int64": ({"seed": 2**63}, "seed"),
    "negative temperature": ({"temperature": -1}, "temperature"),
    "temperature NaN": ({"temperature": float("nan")}, "JSON"),
    "temperature infinity": ({"temperature": float("inf")}, "JSON"),
    "no top_p": ({"top_p": 0}, "top_p"),
    "no repetition penalty": ({"repetition_penalty": 0}, "repetition_penalty is 0"),
}
JSON = {"Content-Type": "application/json"}  # for what httpx refuses to encode, such as NaN
NO_TLS = ssl.SSLContext()  # by default, httpx reads all certificates again for each request
MALFORMED = (b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"prompt": {}}', b'{"prompt": [[[1]]]}')


def fields(server: Server, **others: Any) -> dict[str, Any]:
    """A short honest completion, with `others` instead of or besides its fields."""
    honest = {"model": server.model, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    return honest | others


def ask(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """The status and text of an answer."""
    content = json.dumps(body)
    answer = httpx.post(
        server.address + path, content=content, headers=JSON, timeout=TIMEOUT_S, verify=NO_TLS
    )
    return answer.status_code, answer.text


def leave(server: Server, path: str, body: dict[str, Any], seconds: float) -> None:
    """Ask, and hang up before the answer is there."""
    try:
        httpx.post(server.address + path, json=body, timeout=seconds, verify=NO_TLS)
    except httpx.ReadTimeout:
        return
    raise AssertionError("the answer was there before the client left")


def soak(server: Server, first: dict[str, str], *, clients: int, each: int) -> Counter[str]:
    """How often malformed, hostile, aborted and honest requests were made, `each` by one client.

    Honest ones get the text of `first`; the others are refused.
    """
    made: Counter[str] = Counter()
    url = f"{server.address}/v1/completions"

    async def post(http: httpx.AsyncClient, content: bytes | str) -> httpx.Response:
        return await http.post(url, content=content, headers=JSON)

    async def honest(http: httpx.AsyncClient, rng: random.Random) -> None:
        prompt = rng.choice(PROMPTS)
        answer = await post(http, json.dumps(fields(server, prompt=prompt, max_tokens=TOKENS)))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == first[prompt]

    async def hostile(http: httpx.AsyncClient, rng: random.Random) -> None:
        body, _ = rng.choice(list(COMPLETIONS.values()))
        answer = await post(http, json.dumps(fields(server, **body)))
        assert answer.status_code == 400, answer.text

    async def malformed(http: httpx.AsyncClient, rng: random.Random) -> None:
        answer = await post(http, rng.choice(MALFORMED))
        assert 400 <= answer.status_code < 500, answer.text

    async def aborted(http: httpx.AsyncClient, rng: random.Random) -> None:
        more = {"max_tokens": 2000, "stream": True, "ignore_eos": True, "n": rng.choice((1, 1, 3))}
        body = fields(server, prompt=rng.choice(PROMPTS), temperature=1, **more)
        async with http.stream("POST", url, json=body) as answer:
            async for _ in answer.aiter_lines():
                if rng.random() < 0.3:
                    break

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            for _ in range(each):
                act = rng.choice((honest, hostile, malformed, aborted))
                await act(http, rng)
                made[act.__name__] += 1

    async def everybody() -> None:
        await asyncio.gather(*(client(seed) for seed in range(clients)))

    asyncio.run(everybody())
    return made
