"""Served by SGLang in fp32, the model computes what transformers computes, under every flag.

So drafts change no token: with and without them, an answer is transformers' own.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import pytest

from checkpoints import BASE, SHAPES, random_prompt, write_checkpoint
from engines.checks import LENGTHS, TOKENS, check_greedy
from engines.clients import eventually
from engines.hostile import ask
from engines.sglang.server import FIXED, NEXTN, Answer, Forked, Server
from reference import Reference

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(length) for length in LENGTHS]
SLOTS = 40  # for states
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}


class Case(NamedTuple):
    """A server: the shape of its checkpoint and its flags."""

    shape: str | None  # None: the random checkpoint that most tests serve
    steps: int
    flags: tuple[str, ...] = ()

    @property
    def chain(self) -> bool:
        return self.steps > 0 and "--speculative-eagle-topk" not in self.flags

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return int(self.flags[-1]) if "--chunked-prefill-size" in self.flags else 2048

    @property
    def uncached(self) -> bool:
        return not self.cached

    @property
    def cached(self) -> bool:
        return "--disable-radix-cache" not in self.flags


SHAPE_0, SHAPE_1, SHAPE_2, SHAPE_3 = SHAPES
CASES = {
    "plain": Case(None, 0),
    "steps-1_chunks-of-257": Case(SHAPE_0, 1, ("--chunked-prefill-size", "257")),
    "steps-2_topk-2": Case(
        SHAPE_1, 2, ("--speculative-eagle-topk", "2", "--speculative-num-draft-tokens", "5")
    ),
    "steps-2_no-cache": Case(SHAPE_2, 2, ("--disable-radix-cache",)),
    "steps-3_chunks-of-67": Case(SHAPE_3, 3, ("--chunked-prefill-size", "67")),
    "steps-3": Case(None, 3),
}


def cases(condition: str) -> pytest.MarkDecorator:
    """Run a test on the cases that are what is named."""
    names = [name for name, case in CASES.items() if getattr(case, condition)]
    return pytest.mark.parametrize("case", names, indirect=True, scope="module")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def server(case, checkpoint, tmp_path_factory) -> Iterator[Server]:
    if case.shape is not None:
        folder = tmp_path_factory.mktemp("shape")
        checkpoint = write_checkpoint(folder, seed=case.steps, **SHAPES[case.shape])
    drafts = (*NEXTN, str(case.steps)) if case.steps else ()
    small = ("--dtype", "float32", "--max-total-tokens", "16384", "--max-mamba-cache-size")
    seen = ("--enable-metrics", "--decode-log-interval", "1")
    flags = (*small, str(SLOTS), *seen, *drafts, *case.flags)
    server = Forked(checkpoint, *flags, env=FIXED).wait()
    yield server
    server.close()


@pytest.fixture(scope="module")
def model(server, reference) -> Reference:
    return reference(server.folder)


def test_each_prompt_alone(server, model):
    answers = [server.greedy([prompt], TOKENS, **LOGPROBS)[0] for prompt in PROMPTS]
    check_greedy(model, PROMPTS, answers)


def test_all_prompts_in_one_batch(server, model):
    check_greedy(model, PROMPTS, server.greedy(PROMPTS, TOKENS, **LOGPROBS))


@cases("cached")
def test_continued_texts_hit_the_cache(server, model):
    """Each prompt goes on where an earlier answer ended, or is another after a shared beginning."""
    server.forget()
    starts = [random_prompt(n, seed=1) for n in (2, 64, 300, 1000)]
    cold = server.greedy(starts, TOKENS)
    assert [answer.cached for answer in cold] == [0] * len(starts)
    turns = [
        start + answer.token_ids + random_prompt(n, seed=2)
        for start, answer, n in zip(starts, cold, (1, 7, 70, 9), strict=True)
    ]
    turns += [start + random_prompt(5, seed=3) for start in starts]
    warm = server.greedy(turns, TOKENS, return_logprob=True)
    # The last token of an answer has no state yet.
    assert all(answer.cached >= len(start) for answer, start in zip(warm, starts * 2, strict=True))
    check_greedy(model, turns, warm)


@cases("uncached")
def test_one_page_a_request_while_it_runs(server):
    """Where the radix cache keeps none of its own; drafts have no part in how many there are."""
    held, pool = {0.0}, set()
    prompts = [random_prompt(n, seed=6) for n in range(30, 35)]

    def all_seen() -> bool:
        """Whether all requests were seen to run at once, which a busy machine may miss."""
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(server.greedy, prompts, 300)
            while not answers.done():
                metrics = server.metrics()
                held.add(used := metrics["sglang:mamba_used_tokens"])
                pool.add(used + metrics["sglang:mamba_available_tokens"])
        assert sum(answer.accepted for answer in answers.result()) > 0
        return max(held) >= len(prompts)

    assert eventually(all_seen)
    assert max(held) == len(prompts)
    assert max(pool) == SLOTS


@cases("uncached")
def test_prompts_of_embeddings_beside_others(server, model):
    """Each is answered as the tokens would be whose embeddings it has."""
    weight = model.trunk.get_input_embeddings().weight.detach()
    prompts = [random_prompt(n, seed=7) for n in (70, 5, 31, 12)]
    rows = [weight[list(prompt)].tolist() for prompt in prompts]
    params = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}

    def ask_for(prompt: dict[str, Any]) -> Answer:
        asked = prompt | {"sampling_params": params, "return_logprob": True}
        return Answer.of(server.post("/generate", **asked), **asked)

    embeds = [{"input_embeds": each} for each in rows]
    both = [*embeds, *({"input_ids": list(prompt)} for prompt in prompts)]
    with ThreadPoolExecutor(3 * len(both)) as pool:  # so that steps read several
        answers = list(pool.map(ask_for, [*embeds[:1], *both[::-1], *both]))
    check_greedy(model, [prompts[0], *prompts[::-1] * 2, *prompts * 2], answers)


@cases("uncached")
def test_hostile_embeddings_are_refused(server, case):
    """And end no server, as the tests behind this one see."""
    size = SHAPES[case.shape].get("hidden_size", BASE["hidden_size"])
    shape = f"allowed is [tokens, {size}]"
    row = [0.5] * size
    for embeds, says in (
        ([row, row[:3]], f"input_embeds is no [tokens, {size}] array: expected sequence"),
        ([row[:4]], f"input_embeds has shape [1, 4]; {shape}"),
        ([[1e300, *row[1:]]], "input_embeds has a value that is not finite in fp32"),
    ):
        status, text = ask(server, "/generate", {"input_embeds": embeds})
        assert (status, says in text) == (400, True), text
    nowhere = {"input_embeds": [row], "session_params": {"id": "a"}}
    status, text = ask(server, "/generate", nowhere)
    assert (status, "input_embeds: a session continues token ids" in text) == (400, True), text
    score = {"query": [5, 6], "items": [[7]], "label_token_ids": [3], "model": server.model}
    override = {"embed_override_token_id": 6, "query_embed_overrides": [row[:5]]}
    status, text = ask(server, "/v1/score", score | override)
    assert (status, f"overrides has shape [1, 5]; {shape}" in text) == (400, True), text
    assert ask(server, "/v1/score", score | override | {"query_embed_overrides": [row]})[0] == 200


@cases("chain")
def test_drafts_are_accepted_as_often_as_the_reference_head_is_right(server, case, model):
    prompts = [random_prompt(n, seed=4) for n in (5, 64, 130, 300)]
    answers = server.greedy(prompts, 64)
    steps, accepted = (sum(getattr(a, name) for a in answers) for name in ("steps", "accepted"))
    assert 0 < accepted < case.steps * steps
    check_greedy(model, prompts, answers)
    expected = [
        model.accepted(prompt, answer.token_ids, case.steps)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    made, right = (sum(column) for column in zip(*expected, strict=True))
    # A request's last drafts may be cut short by its token limit, so a few may differ.
    assert accepted == pytest.approx(right, abs=case.steps * len(prompts))
    # The MTP layer reads the prompts one after the other, in slices; till then nothing is drafted.
    until = [-(-tokens // case.chunk) for tokens in accumulate(map(len, prompts))]
    assert 0 <= steps - made / case.steps <= len(prompts) + sum(until)


@cases("steps")
def test_some_drafts_are_right_and_some_are_not(server, case):
    (answer,) = server.greedy([PROMPTS[-2]], 64)
    assert 0 < answer.accepted < case.steps * answer.steps
