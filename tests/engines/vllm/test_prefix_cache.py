"""Prefix-cache hits, of whole blocks and of parts of one, change neither tokens nor drafts."""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import Output
from engines.shared_prefixes import END
from engines.vllm.offline import Offline
from qwen3next_plugin.engines.shared_prefixes import LEAST
from tiers import long_except

pytestmark = pytest.mark.serve

BLOCK = 128  # tokens, of the random checkpoints
LENGTHS = (20, 127, 128, 129, 253, 256, 404)
SOME = (20, 128, 129, 404)  # without --long
TOKENS = 32
NEAR = 1e-4  # log-probabilities in fp32, where a chunk has other rows: products round otherwise


class Case(NamedTuple):
    """An engine; unit: of prefix matching."""

    layers: int
    num_drafts: int
    unit: int
    dtype: str = "float32"
    chunk: int | None = None


CASES = {
    "4-layers": Case(4, 0, BLOCK),
    "4-layers_mtp-3": Case(4, 3, BLOCK),
    "4-layers_units-of-8": Case(4, 0, 8),
    "4-layers_mtp-3_units-of-8": Case(4, 3, 8),
    "8-layers_units-of-8": Case(8, 0, 8),
    "8-layers_mtp-2_units-of-16_chunks-of-50": Case(8, 2, 16, chunk=50),
    "8-layers_mtp-3_units-of-8_bfloat16": Case(8, 3, 8, "bfloat16"),
}
SHARED = "4-layers_mtp-3_units-of-8"  # whose engine other tests use, too
# The other cases, engines of their own, with --long: drafts have units of 8 in another one.
ALWAYS = [name for name in CASES if name not in ("4-layers_units-of-8", "8-layers_units-of-8")]
PAIRS = {
    "blocks": ("4-layers", "4-layers_mtp-3"),
    "units-of-8": ("4-layers_units-of-8", "4-layers_mtp-3_units-of-8"),
}


class Chat(NamedTuple):
    """A prompt, the same again, and a second turn, from the cache and with an empty one."""

    prompt: tuple[int, ...]
    cold: Output
    again: Output
    second: Output
    second_cold: Output


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Any:
    """Starts the engine of a case."""
    folder = cache(
        lambda layers: write_checkpoint(
            tmp_path_factory.mktemp(f"layers-{layers}"), num_hidden_layers=layers
        )
    )

    def start(case: Case) -> Offline:
        flags: dict[str, Any] = {
            "dtype": case.dtype,
            "max_model_len": 512,
            "prefix_match_unit": case.unit,
        }
        if case.num_drafts:
            flags["speculative_config"] = {
                "method": "mtp",
                "num_speculative_tokens": case.num_drafts,
            }
        if case.chunk:
            flags |= {"max_num_batched_tokens": case.chunk, "max_num_seqs": 8}
        return Offline(folder(case.layers), **flags)

    return start


@pytest.fixture(scope="module")
def shared(start) -> Iterator[Offline]:
    engine = start(CASES[SHARED])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def chats(start, shared, size) -> Any:
    """The chats of a case, held once; a page of state per request and layer meanwhile."""

    @cache
    def chats(name: str) -> list[Chat]:
        engine = shared if name == SHARED else start(CASES[name])
        try:
            held = [hold(engine, conversation(n)) for n in size(SOME, LENGTHS)]
            pages = engine.inside("pages", [random_prompt(n, seed=6) for n in (100, 250)], 40)
        finally:
            if engine is not shared:
                engine.close()
        # Beside its own page a request keeps at most the one before, which is for the cache.
        assert pages["held"] == {1, 2}
        assert pages["in_use"] == 0
        return held

    return chats


def conversation(length: int) -> tuple[int, ...]:
    """A prompt of three messages and more, which another turn may follow."""
    return (*3 * (2, END), *random_prompt(length - 6, seed=1))


def hold(engine: Offline, prompt: tuple[int, ...]) -> Chat:
    def ask(ids: tuple[int, ...]) -> Output:
        return engine.greedy([ids], TOKENS, logprobs=0)[0]

    engine.forget()
    cold, again = ask(prompt), ask(prompt)
    longer = prompt + cold.token_ids + random_prompt(25, seed=7)
    second = ask(longer)
    engine.forget()
    return Chat(prompt, cold, again, second, ask(longer))


def hit(case: Case, tokens: int) -> int:
    """Tokens of a conversation that is sent again that vLLM takes from the cache.

    The last token is always computed. With MTP the last unit that matches is dropped: in it the
    drafter has seen a token that the next prompt may not have. Pages are kept at the last block
    and, unless that is close, at the last unit.
    """

    def last(size: int) -> int:
        return max(0, tokens // size - 1) * size if case.num_drafts else (tokens - 1) // size * size

    block, end = last(BLOCK), last(case.unit)
    return end if end - block >= LEAST else block


@pytest.mark.parametrize("name", long_except(ALWAYS, CASES))
def test_the_same_prompt_again(chats, name):
    for chat in chats(name):
        assert chat.cold.cached == 0
        assert chat.again.cached == hit(CASES[name], len(chat.prompt))
        assert chat.again.token_ids == chat.cold.token_ids, len(chat.prompt)
        assert chat.again.logprobs == chat.cold.logprobs, len(chat.prompt)


@pytest.mark.parametrize("name", long_except(ALWAYS, CASES))
def test_the_second_turn_of_a_chat(chats, name):
    for chat in chats(name):
        assert chat.second_cold.cached == 0
        assert chat.second.cached >= hit(CASES[name], len(chat.prompt))
        assert chat.second.token_ids == chat.second_cold.token_ids, len(chat.prompt)
        assert chat.second.logprobs == pytest.approx(chat.second_cold.logprobs, abs=NEAR)


@pytest.mark.parametrize("pair", long_except(["blocks"], PAIRS))
def test_drafting_costs_a_hit_one_unit_at_most(chats, pair):
    off, on = PAIRS[pair]
    unit = CASES[on].unit or BLOCK
    for without, with_drafts in zip(chats(off), chats(on), strict=True):
        assert without.again.cached - with_drafts.again.cached <= unit
        assert without.second.cached - with_drafts.second.cached <= unit


class Drafts(NamedTuple):
    """An engine whose tests set how much is drafted."""

    engine: Offline

    def of(self, prompt: tuple[int, ...], *, draft: int) -> tuple[Output, dict[int, list[int]]]:
        self.engine.inside("draft", draft)
        output = self.engine.greedy([prompt], TOKENS)[0]
        return output, *(self.engine.inside("drafts") or [{}])


@pytest.fixture(scope="module")
def drafts(shared) -> Drafts:
    return Drafts(shared)


def hit_after(
    drafts: Drafts, seed: int, *, draft: int
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """A prompt that hits the block of a request which drafted so much, and the same one cold."""
    drafts.engine.forget()
    first = random_prompt(BLOCK - 26, seed=seed)
    answer, _ = drafts.of(first, draft=draft)  # ends soon after it has filled the block
    longer = first + answer.token_ids[:30] + random_prompt(10, seed=seed)
    drafts.of(longer, draft=draft)  # matches the block up to its end, which leaves a state there
    warm, found = drafts.of(longer, draft=3)
    drafts.engine.forget()
    cold, expected = drafts.of(longer, draft=3)
    assert (warm.cached, cold.cached) == (BLOCK, 0)
    assert warm.token_ids == cold.token_ids
    return found, expected


@pytest.mark.parametrize("seed", long_except((0, 1), range(4)))
def test_a_hit_on_what_the_mtp_layer_has_read_drafts_as_a_cold_run(drafts, seed):
    found, expected = hit_after(drafts, seed, draft=3)
    assert found == expected
    assert len(found) >= TOKENS // 4  # a step makes at most four tokens


@pytest.mark.parametrize("seed", long_except((0, 1), range(4)))
def test_a_hit_on_what_it_has_not_read_drafts_from_zeros(drafts, seed):
    """vLLM fills new blocks with zeros, so what an earlier request left there has no effect."""
    found, _ = hit_after(drafts, seed, draft=0)
    drafts.engine.inside("poison")
    again, _ = hit_after(drafts, seed, draft=0)
    assert again == found
    assert len(found) >= TOKENS // 4  # a step makes at most four tokens


def test_drafts_beside_a_request_at_the_end_of_its_context(drafts):
    """It cannot be drafted for any more; that is no reason not to draft for others."""
    last, other = random_prompt(440, seed=8), random_prompt(60, seed=8)
    engine = drafts.engine
    engine.forget()
    engine.inside("draft", 3)
    engine.greedy([other], 120)
    (alone,) = engine.inside("drafts")
    engine.forget()
    each = ({"max_tokens": 512 - len(last)}, {"max_tokens": 120})
    engine.generate([last, other], each, temperature=0.0)
    cut_short, beside = engine.inside("drafts")
    assert beside == alone
    assert len(cut_short) > 20


LONG, SHORT, STREAM = (
    random_prompt(470, seed=9),
    random_prompt(30, seed=10),
    random_prompt(9, seed=3),
)


def test_a_prompt_of_one_token_is_one_row(drafts):
    """vLLM would pad it to the rows of a draft; a CPU would compute them all."""
    drafts.engine.forget()
    drafts.engine.inside("draft", 3)
    held = drafts.engine.inside("beside", STREAM, [SHORT[:1]], TOKENS, 0)
    assert next(rows for stream, rows in held["steps"] if stream and rows) == 1


def test_a_stream_goes_on_beside_long_prompts(drafts):
    """A step of no budget reads 8 tokens. All texts, and hits afterwards, are those without one."""
    engine, found = drafts.engine, {}
    engine.inside("draft", 3)
    for seconds in (0, 1e-6):
        engine.forget()
        held = engine.inside("beside", STREAM, [LONG, SHORT], TOKENS, seconds)
        held["again"] = engine.greedy([LONG], TOKENS, logprobs=0)[0]
        found[seconds] = held
    whole, paced = found[0], found[1e-6]
    assert paced["answers"] == whole["answers"]
    assert paced["again"].token_ids == whole["again"].token_ids
    assert paced["again"].cached == whole["again"].cached > 0
    beside = [step for step in paced["steps"] if step[0] and max(step[1:]) > 4]
    assert len(beside) >= 20  # of the stream's 128 tokens at most 4 in each
    assert all(step[0] <= 4 and min(step[1:]) <= 4 and max(step[1:]) <= 8 for step in beside)
    begun = next(i for i, step in enumerate(paced["steps"]) if step[2] == 1)
    assert begun <= 4 + 2 * (len(SHORT) // 8 + 1)  # turns of a long and a short one
    assert 0 < paced["longest"] < 60
