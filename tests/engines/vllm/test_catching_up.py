"""The MTP layer reads a prompt when drafts follow, and then drafts as if it had read it at once."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from checkpoints import SHIPPED
from engines.checks import Output
from engines.traffic import source_tokens
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

K, CHUNK, TOKENS = 3, 96, 40
TEXT = source_tokens()
SHORT = [tuple(TEXT[start : start + n]) for start, n in ((0, 20), (300, 61), (700, 90))]
LONG = [tuple(TEXT[start : start + n]) for start, n in ((900, 97), (100, 230), (500, 400))]


class Run(NamedTuple):
    outputs: list[Output]
    drafts: list[dict[int, list[int]]]  # of each request, by position
    passes: list[int]  # tokens of each pass of the MTP layer
    caught_up: float  # tokens


class Drafter(NamedTuple):
    """An engine whose tests set how much is drafted."""

    engine: Offline

    def run(
        self, prompts: list[tuple[int, ...]], num_drafts: int, *tokens: int, **how: object
    ) -> Run:
        """`tokens`: of all answers, or of each."""
        self.engine.forget()
        self.engine.inside("draft", num_drafts, **how)
        before = self.caught_up()
        each = [{"max_tokens": n} for n in tokens or (TOKENS,)]
        outputs = [one for (one,) in self.engine.generate(prompts, each, temperature=0.0)]
        return Run(
            outputs,
            self.engine.inside("drafts"),
            self.engine.inside("passes"),
            self.caught_up() - before,
        )

    def caught_up(self) -> float:
        return self.engine.inside("board", "tokens_caught_up")[""]


@pytest.fixture(scope="module")
def drafter() -> Iterator[Drafter]:
    engine = Offline(
        SHIPPED,
        dtype="float32",
        max_model_len=512,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        speculative_config={"method": "mtp", "num_speculative_tokens": K},
    )
    yield Drafter(engine)
    engine.close()


@pytest.mark.parametrize("prompts", [SHORT, LONG], ids=["short", "chunks"])
def test_without_drafts_the_layer_reads_nothing(drafter, prompts):
    run = drafter.run(prompts, 0, 16)
    assert run.passes == []
    assert not any(run.drafts)
    assert run.caught_up == 0
    assert [o.token_ids for o in run.outputs] == [
        o.token_ids for o in drafter.run(prompts, K, 16).outputs
    ]


def test_a_row_without_a_draft_has_one_token(drafter):
    """Also that of a request which begins when others decode, as the ninth of at most eight."""
    tokens = (4, *[12] * 8)
    drafter.engine.inside("count_calls")
    run = drafter.run([(token,) for token in TEXT[:9]], 0, *tokens)
    assert drafter.engine.inside("calls")["tokens"] == sum(tokens)
    assert [len(output.token_ids) for output in run.outputs] == [*tokens]


@pytest.mark.parametrize("prompt", SHORT, ids=len)
def test_a_prompt_is_read_after_the_first_step_that_decodes(drafter, prompt):
    run = drafter.run([prompt], K)
    assert run.passes[0] == len(prompt) + 1  # and the first token, which that step has read
    assert run.caught_up == len(prompt)
    assert min(run.drafts[0]) == len(prompt) + 1
    assert drafter.run([prompt], K, 1).passes == []


@pytest.mark.parametrize("prompt", LONG, ids=len)
def test_a_pass_reads_as_much_as_a_step_may(drafter, prompt):
    run = drafter.run([prompt], K)
    slices = (len(prompt) + 1) // CHUNK
    assert run.passes[:slices] == [CHUNK] * slices
    assert max(run.passes) == CHUNK
    assert len(prompt) + slices <= min(run.drafts[0])  # none before it has caught up


@pytest.mark.parametrize("prompts", [SHORT, LONG, SHORT + LONG], ids=["short", "chunks", "mixed"])
def test_drafts_as_if_prompts_were_read_at_once(drafter, prompts):
    later, at_once = drafter.run(prompts, K), drafter.run(prompts, K, at_once=True)
    assert later.outputs == at_once.outputs
    assert at_once.caught_up == 0
    for found, expected in zip(later.drafts, at_once.drafts, strict=True):
        both = found.keys() & expected.keys()
        assert len(both) > TOKENS // 8
        assert {at: found[at] for at in both} == {at: expected[at] for at in both}


@pytest.mark.parametrize("at_once", [False, True])
def test_each_request_drafts_its_own_number_of_tokens(drafter, at_once):
    prompts = SHORT + LONG
    ragged = drafter.run(prompts, K, ragged=True, at_once=at_once)
    equal = drafter.run(prompts, K)
    assert ragged.outputs == equal.outputs
    lengths = set()
    for found, expected in zip(ragged.drafts, equal.drafts, strict=True):
        for at in found.keys() & expected.keys():
            lengths.add(len(found[at]))
            assert found[at] == expected[at][: len(found[at])]
    assert lengths == set(range(1, K + 1))


def test_a_prompt_that_can_not_be_kept_is_answered_without_drafts(drafter):
    short, long = SHORT[0], LONG[2]
    lost = drafter.run([short, long], K, max_bytes=2**16)
    kept = drafter.run([short, long], K)
    assert lost.outputs == kept.outputs
    assert [max(drafts, default=0) > len(short) for drafts in kept.drafts] == [True, True]
    assert lost.drafts == [drafter.run([short], K).drafts[0], {}]


def test_drafts_after_steps_without_while_requests_come_and_go(drafter):
    """Few of those steps choose lengths."""
    prompts, tokens = 2 * (SHORT + LONG), [5, 40, 9, 34, 14, 40, 7, 23, 31, 40, 12, 40]
    plain = drafter.run(prompts, 0, *tokens, idle=100)
    asked = drafter.engine.inside("asked")
    later = drafter.run(prompts, K, *tokens, after=3, idle=100)
    at_once = drafter.run(prompts, K, *tokens, at_once=True)
    assert plain.outputs == later.outputs == at_once.outputs
    assert 0 < asked < max(tokens) // 2  # times, in more steps than the longest answer has
    both = [
        (found[at], expected[at])
        for found, expected in zip(later.drafts, at_once.drafts, strict=True)
        for at in found.keys() & expected.keys()
    ]
    assert len(both) > TOKENS // 8
    assert all(found == expected for found, expected in both)


def test_streaming_input(drafter):
    """A prompt that goes on where its answer ended is a prompt, not drafts to verify."""
    pieces, context, expected = [*SHORT, (7,), LONG[1]], list[int](), list[int]()
    for piece in pieces:
        context += piece
        (output,) = drafter.run([tuple(context)], 0, 8).outputs
        context += output.token_ids[:-1]  # vLLM drops the last one, which no step has read
        expected += output.token_ids
    drafter.engine.inside("draft", K)
    assert drafter.engine.inside("stream", pieces, 8) == expected
    assert drafter.caught_up() > 0


def test_streaming_input_whose_answers_end_inside_drafts(drafter):
    pieces = [*SHORT, (7,), LONG[1], (9,), SHORT[1]]
    whole = [output.token_ids for output in drafter.run(SHORT, 0).outputs]
    stops = tuple({tokens[at] for tokens in whole for at in (1, 2, 5)})
    drafter.engine.inside("draft", 0)
    plain = drafter.engine.inside("stream", pieces, 12, stops)
    drafter.engine.inside("draft", K)
    accepted = drafter.engine.inside("board", "drafts_accepted")
    assert drafter.engine.inside("stream", pieces, 12, stops) == plain
    assert drafter.engine.inside("board", "drafts_accepted") != accepted


def test_a_prompt_of_embeddings():
    """Whose tokens are unknown, longer than a step."""
    speculation = {"method": "mtp", "num_speculative_tokens": K}
    flags = {"dtype": "float32", "max_model_len": 512, "max_num_batched_tokens": CHUNK}
    table = load_file(SHIPPED / "model.safetensors")["model.embed_tokens.weight"].float()
    prompts = [{"prompt_embeds": table[list(prompt)]} for prompt in (SHORT[0], LONG[1])]
    answers = []
    for own in ({}, {"speculative_config": speculation}):
        engine = Offline(SHIPPED, enable_prompt_embeds=True, **flags, **own)
        answers.append(
            [o.token_ids for (o,) in engine.generate(prompts, max_tokens=12, temperature=0.0)]
        )
        engine.close()
    assert answers[0] == answers[1]
