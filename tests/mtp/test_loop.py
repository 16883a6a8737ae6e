"""The loop: what is kept and read, when lengths are chosen, what is observed. See scripted.py."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import BYTES, Engine, K, Lengths, Script

from qwen3next_plugin.mtp.loop import EVERY, usable_drafts, wait_after

BOTH = ("a", "b")


def started(*names: str, prompt: int = 5, end: int = 1000, **options: object) -> Engine:
    """An engine that has read the prompts."""
    engine = Engine(**options)
    engine.begin(*names, prompt=prompt, end=end)
    engine.step(read=names)
    return engine


def of_each(**lengths: int) -> Lengths:
    return lambda requests: [lengths.get(request, 0) for request in requests]


# what is kept, and what the MTP layer reads -----------------------------------------------------


def test_prompts_and_plain_steps_are_kept():
    engine = started("a", "b")
    for kept in (6, 7):
        assert engine.step(BOTH) == {}
        assert engine.pending("a", "b") == [kept, kept]
    assert not engine.fed


def test_a_first_token_does_not_wait_for_drafts():
    engine = started("a", policy=Script(3))
    assert not engine.policy.asked
    assert engine.step("a") == {"a": 3}
    assert engine.fed == {"a": (0, 6)}
    assert engine.step("a", accepted=2) == {"a": 3}
    assert engine.fed == {"a": (6, 3)}


def test_a_long_prompt_is_read_in_slices_and_drafts_after_the_last():
    engine = started("a", prompt=15, max_tokens=8, policy=Script(3))
    for fed in ((0, 8), (8, 8)):
        assert engine.step("a") == {}
        assert engine.fed == {"a": fed}
    assert engine.step("a") == {"a": 3}
    assert engine.fed == {"a": (16, 2)}


def test_a_step_with_a_budget_reads_less_the_longer_the_context():
    """1,024 tokens for each second, half as many at 4,096; and 16 of each request at least."""
    found = []
    for seconds, prompt in ((0.5, 600), (0.5, 4095), (1e-6, 600), (0, 600)):
        engine = Engine(max_tokens=500, step_seconds=seconds, policy=Script(3))
        engine.begin("a", prompt=prompt, end=9999)
        engine.step(read="a", chunk=prompt)
        engine.step("a")
        found.append(engine.fed["a"])
    assert found == [(0, 446), (0, 256), (0, 16), (0, 500)]


def test_who_catches_up_keeps_nobody_from_drafting():
    engine = started("a", prompt=100, max_tokens=20, policy=Script(3))
    engine.begin("b")
    engine.step(read="b")
    assert engine.step(BOTH) == {"b": 3}
    assert engine.fed == {"a": (0, 14), "b": (0, 6)}
    for at, drafts in ((14, {"b": 3}), (33, {"b": 3})):
        assert engine.step(BOTH) == drafts
        assert engine.fed["a"] == (at, 19)


def test_who_has_not_caught_up_verifies_one_token():
    engine = started("a", prompt=3, max_tokens=4, policy=Script(3))
    assert engine.step("a") == {"a": 3}
    engine.begin("b", prompt=4)
    engine.step(read="b")
    engine.policy.length = 2
    assert engine.step(BOTH) == {"a": 2}
    assert engine.fed == {"a": (4, 1), "b": (0, 3)}
    assert engine.step(BOTH) == {"a": 2, "b": 2}
    assert engine.fed == {"a": (5, 1), "b": (3, 3)}
    engine.step(BOTH)
    assert [drafted for _, drafted, *_ in engine.policy.verified[-2:]] == [2, 2]


def test_a_request_that_does_not_fit_drafts_nothing():
    """Otherwise lengths would be chosen in each step, and the layer would never read a token."""
    engine = started("a", "b", max_bytes=6 * BYTES, policy=Script(3))
    assert engine.step(BOTH) == {"a": 3}
    assert engine.fed == {"a": (0, 6)}
    assert engine.step(BOTH) == {"a": 3}
    del engine.requests["a"]
    for _ in range(40):
        assert engine.step("b") == {}
    assert len(engine.policy.asked) < 2 + 20


def test_prompts_in_chunks_beside_steps_that_decode():
    engine = started("a", policy=Script())
    engine.begin("b", prompt=9)
    for pending in ([6, 4], [7, 8]):
        assert engine.step("a", read="b", chunk=4) == {}
        assert engine.pending("a", "b") == pending
        assert "b" not in engine.loop.ends  # it may be read on from where an answer ended
    engine.step("a", read="b", chunk=4)
    engine.policy.length = 2
    assert engine.step(BOTH) == {"a": 2, "b": 2}
    assert engine.fed == {"a": (0, 9), "b": (0, 10)}


def test_a_step_may_verify_and_read_a_prompt():
    engine = started("a", policy=Script(2))
    engine.step("a")
    engine.begin("b")
    assert engine.step("a", read="b", accepted=1) == {"a": 2}
    assert engine.fed == {"a": (6, 2)}
    assert engine.pending("b") == [5]


def test_requests_that_have_ended_are_dropped():
    engine = started("a", "b")
    engine.step(BOTH)
    del engine.requests["a"]
    engine.step("b")
    assert engine.pending("a", "b") == [0, 7]
    assert "a" not in engine.loop.ends
    assert engine.policy.forgotten == ["a"]


def test_prompts_that_end_at_once_leave_nothing():
    """As where only their log-probabilities are asked for, so that no step decodes."""
    engine = Engine()
    for name in "abc":
        engine.requests.clear()
        engine.begin(name)
        engine.step(read=name)
    assert engine.pending(*"abc") == [0, 0, 5]


def test_who_waits_between_steps_goes_on():
    """As where a step has no room for all that run."""
    engine = started("a", "b", policy=Script(2))
    engine.step(BOTH)
    assert engine.step("a") == {"a": 2}
    assert engine.step("a") == {"a": 2}
    assert engine.step(BOTH) == {"a": 2, "b": 2}
    assert ("b", 2, 0, 1) in engine.policy.verified


@pytest.mark.parametrize("cached", [0, 2])
def test_a_preempted_request_is_read_anew(cached):
    engine = started("a", policy=Script(2))
    engine.step("a")
    engine.step("a")
    engine.preempt("a", cached)
    engine.step(read="a")
    assert engine.pending("a") == [8 - cached]
    assert engine.policy.forgotten == []
    assert engine.step("a") == {"a": 2}
    assert engine.fed == {"a": (cached, 9 - cached)}


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_session_goes_on_where_its_answer_ended(drafts):
    """What is added is a prompt, no drafts to verify; the layer reads both parts once."""
    engine = started("a", policy=Script(drafts))
    engine.step("a")
    read = 6 if drafts else 0
    one = engine.requests["a"]
    one.prompt, one.drafts = one.computed + 4, 0
    seen = len(engine.policy.verified)
    assert engine.step(read="a") == {}
    assert len(engine.policy.verified) == seen
    engine.policy.length = 2
    assert engine.step("a") == {"a": 2}
    assert engine.fed == {"a": (read, 11 - read)}


def test_beside_a_connector_every_token_is_read_at_once():
    engine = Engine(must_run=True, policy=Script(2), max_tokens=8)
    engine.begin("a")
    engine.begin("b", prompt=12)
    engine.step(read="a")
    assert engine.fed == {"a": (0, 5)}
    engine.step("a", read="b", chunk=7)
    assert engine.fed == {"a": (5, 1), "b": (0, 7)}
    engine.policy.length = 0
    engine.step("a", read="b")
    assert engine.fed == {"a": (6, 1), "b": (7, 5)}
    for at in (7, 8):
        engine.step(BOTH)
        assert engine.fed == {"a": (at, 1), "b": (at + 5, 1)}
    assert engine.pending("a", "b") == [0, 0]


def test_drafts_may_follow_prompts_at_once():
    """As where a whole answer is waited for."""
    engine = Engine(must_run=True, after_prompts=True, policy=Script(2))
    engine.begin("a", prompt=7)
    assert engine.step(read="a", chunk=4) == {}
    assert engine.step(read="a") == {"a": 2}
    assert engine.fed == {"a": (4, 3)}
    assert engine.policy.verified == []
    assert engine.policy.timed == []
    engine.step("a", accepted=1)
    assert engine.policy.verified == [("a", 2, 1, 1)]


def test_nothing_is_drafted_beyond_the_end_of_an_answer():
    engine = started("a", end=10, policy=Script(3))
    engine.begin("b")
    engine.step(read="b")
    for drafts in (2, 1, 0, 0):
        found = engine.step(BOTH)
        assert (found.get("a", 0), found["b"]) == (drafts, 3)


@pytest.mark.parametrize("answers", range(4 * EVERY, 5 * EVERY))
def test_answers_without_room_for_drafts_delay_no_later_ones(answers):
    engine = started("a", end=7, policy=Script(3))
    for _ in range(answers):
        engine.step("a")
        engine.requests.clear()
        engine.begin("a", end=7)
        engine.step(read="a")
    engine.begin("b")
    engine.step(read="b")
    assert engine.step("b") == {"b": 3}


def test_usable_drafts_leave_a_token_for_the_step_itself():
    """A step of n drafts ends an answer exactly if it has room for n."""
    for computed in range(20):
        drafts = usable_drafts(20, computed)
        assert computed + 1 + drafts + 1 == 20 or drafts == 0


# when lengths are chosen ------------------------------------------------------------------------


def test_few_steps_are_collected_at_first():
    assert [wait_after(idle) for idle in (0, 1, 3, 7, 8, 12)] == [1, 1, 1, 1, 2, 3]
    assert wait_after(10**6) == EVERY


def choices(engine: Engine, steps: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[int]:
    """The steps after which lengths are chosen; each decodes some, and reads chunks of others."""
    found = []
    for number, (decode, read) in enumerate(steps):
        asked = len(engine.policy.asked)
        engine.step(decode, read=read, chunk=1)
        found += [number] * (len(engine.policy.asked) - asked)
    return found


def due(steps: int) -> list[int]:
    """Steps after which lengths are chosen, if nothing is ever drafted."""
    found, wait = [], 1
    for idle in range(1, steps + 1):
        wait -= 1
        if not wait:
            found.append(idle - 1)
            wait = wait_after(idle)
    return found


PATTERNS = {  # of steps: who decodes, whose prompts are read
    "the same": [("ab", "")],
    "in turn": [("a", ""), ("ab", ""), ("b", "")],
    "with chunks": [("ab", ""), ("ab", "c"), ("ab", "c")],
    "all of it": [("a", "c"), ("b", ""), ("b", ""), ("ab", "c"), ("ab", ""), ("ab", "")],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_drafts_lengths_are_chosen_every_few_steps(pattern):
    """Whatever requests come and go: to choose at each change would take longer than it gains."""
    engine = started("a", "b")
    engine.begin("c", prompt=1000)
    steps = (PATTERNS[pattern] * 100)[:100]
    found = choices(engine, steps)
    assert found == due(100)
    assert max(b - a for a, b in pairwise(found)) == EVERY
    for name in "ab":
        pending = engine.policy.asked[-1].get(name)
        assert pending is None or pending >= 5 + engine.requests[name].steps - EVERY


def test_steps_that_only_read_prompts_choose_nothing_and_count_for_nothing():
    engine = started("a")
    engine.begin("b", prompt=1000)
    steps = [("a", ""), ("", "b"), ("", "b")] * 20
    assert choices(engine, steps) == [3 * step for step in due(20)]


def test_after_drafts_lengths_are_chosen_at_once():
    engine = started("a", policy=Script())
    engine.loop.idle = engine.loop.wait = 4 * EVERY
    for _ in range(4 * EVERY):
        engine.step("a")
    assert len(engine.policy.asked) == 1
    engine.policy.length = 2
    for _ in range(EVERY):
        drafts = engine.step("a")
    assert drafts == {"a": 2}
    assert len(engine.policy.asked) == 2
    engine.policy.length = 0
    assert choices(engine, [("a", "")] * 6) == [0, 1, 2, 3, 4, 5]


def test_a_slice_of_a_prompt_is_followed_by_the_next():
    engine = started("a", prompt=20, max_tokens=8)
    engine.loop.idle = 4 * EVERY
    engine.policy.length = 2
    for fed in ((0, 8), (8, 8), (16, 7)):
        engine.step("a")
        assert engine.fed == {"a": fed}
    assert engine.requests["a"].drafts == 2


def test_pending_tokens_count_when_lengths_are_chosen():
    """Those of the step that has just ended do not: they are read in any case."""
    engine = started("a")
    engine.loop.idle, engine.loop.wait = 100, 3
    for _ in range(3):
        engine.step("a")
    engine.step("a")
    assert engine.policy.asked == [{"a": 7}]
    for _ in range(EVERY - 1):
        engine.step("a")
    assert engine.policy.asked[1:] == [{"a": 15}]


class FirstRank:
    """Of two ranks; it decides for both."""

    world_size = 2
    decided = torch.tensor([1, 3, 2])

    def broadcast(self, input_: torch.Tensor, src: int) -> torch.Tensor:
        assert (input_.tolist(), src) == ([4, 4, 4], 0)
        return self.decided


def test_the_first_rank_decides():
    engine = started("a", "b", "c", max_bytes=6 * BYTES, ranks=FirstRank(), policy=Script(4))
    assert engine.step("abc") == {"a": 1}  # the others are lost
    assert len(engine.policy.asked) == 1


# what is observed -------------------------------------------------------------------------------


def test_a_step_that_reads_a_prompt_is_not_timed():
    engine = started("a")
    engine.step("a", seconds=2.0)
    engine.begin("b")
    engine.step("a", read="b", seconds=9.0)
    engine.step(BOTH, seconds=None)  # an engine may say so of the one after it
    engine.step(BOTH, seconds=3.0)
    engine.loop.keep_plain()
    assert engine.policy.timed == [("step", 1, 1, 2.0), ("step", 2, 2, 3.0)]
    assert engine.board.read("steps") == {"plain": 2, "verify": 0}
    assert engine.board.read("seconds")["plain"] == 5.0


def test_collected_steps_are_observed_together_by_their_median():
    engine = started("a")
    engine.loop.idle, engine.loop.wait = 100, 3
    for seconds in (1.0, 9.0, 2.0):
        assert engine.policy.timed == []
        engine.step("a", seconds=seconds)
    assert engine.policy.timed == [("step", 1, 1, 2.0)]
    assert engine.policy.verified == [("a", 0, 0, 3)]
    assert engine.board.read("steps")["plain"] == 3
    assert engine.board.read("drafts_skipped")[""] == 3


def test_collected_steps_are_observed_once():
    engine = started("a")
    engine.loop.idle, engine.loop.wait = 100, 5
    for _ in range(3):
        engine.step("a")
    engine.loop.keep_plain()
    engine.loop.keep_plain()
    assert engine.policy.verified == [("a", 0, 0, 3)]
    assert engine.pending("a") == [8]
    engine.step("a")
    engine.step("a")
    assert engine.policy.verified == [("a", 0, 0, 3), ("a", 0, 0, 2)]
    assert engine.policy.asked == [{"a": 9}]
    assert engine.board.read("steps")["plain"] == 5


def test_drafts_are_observed_with_what_they_took():
    engine = started("a", "b", policy=Script(of_each(a=3)))
    engine.step(BOTH, seconds=1.0, drafting=0.5)
    engine.step(BOTH, accepted=2, seconds=1.5, drafting=0.25)
    assert engine.policy.verified[2:] == [("a", 3, 2, 1), ("b", 0, 0, 1)]
    assert engine.policy.timed == [
        ("step", 2, 2, 1.0),
        ("draft", 2, 3, 0.5),
        ("step", 2, 5, 1.5),
        ("draft", 2, 3, 0.25),
    ]
    assert engine.board.read("seconds") == {
        "plain": 1.0, "verify": 1.5, "draft": 0.25, "catch_up": 0.5,
    }  # fmt: skip
    assert engine.board.read("tokens_caught_up")[""] == 5
    assert engine.board.read("drafts_skipped")[""] == 2


def test_drafting_is_reported_once_and_only_where_lengths_were_chosen():
    engine = started("a", policy=Script(2))
    engine.loop.drafted(1.0, 1.0)
    assert not engine.policy.timed
    engine.step("a", drafting=0.5)
    engine.loop.drafted(1.0, 1.0)
    assert engine.policy.timed == [("step", 1, 1, 1.0), ("draft", 1, 2, 0.5)]


# any sequence -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_layer_reads_each_token_once_and_in_order(data):
    """engine.py asserts that; here are steps of any kind, and what must be left at the end."""
    draw = data.draw
    engine = Engine(
        policy=Script(lambda requests: [draw(st.integers(0, K)) for _ in requests]),
        max_tokens=draw(st.sampled_from([3, 7, 100])),
        must_run=draw(st.booleans()),
    )
    engine.loop.idle = draw(st.sampled_from([0, 40]))
    names = iter(range(1000))
    decoded = 0
    for _ in range(draw(st.integers(5, 40))):
        requests = engine.requests
        if len(requests) < 4 and draw(st.booleans()):
            engine.begin(
                str(next(names)), prompt=draw(st.integers(1, 20)), end=draw(st.integers(25, 60))
            )
        if requests and draw(st.integers(0, 9)) == 0:
            name = draw(st.sampled_from(sorted(requests)))
            if requests[name].computed >= requests[name].prompt:
                engine.preempt(name, draw(st.integers(0, requests[name].computed - 1)))
        if draw(st.integers(0, 9)) == 0:
            engine.loop.keep_plain()
        run = [name for name in requests if draw(st.integers(0, 5))]
        decode = [name for name in run if requests[name].computed >= requests[name].prompt]
        read = [name for name in run if name not in decode]
        if draw(st.booleans()):  # as under SGLang, a step does one or the other
            decode, read = (decode, []) if decode else ([], read)
        if decode or read:
            decoded += len(decode)
            accepted = draw(st.integers(0, K))
            engine.step(decode, read=read, chunk=draw(st.integers(1, 20)), accepted=accepted)
        for name in [name for name, one in requests.items() if one.computed + 1 >= one.end]:
            del requests[name]
    ready = [name for name, one in engine.requests.items() if one.computed >= one.prompt]
    if engine.requests:
        decoded += len(ready)
        engine.step(ready, read=[name for name in engine.requests if name not in ready])
    engine.loop.keep_plain()
    for name, one in engine.requests.items():
        assert engine.pending(name) == [one.computed - one.read]
    assert sum(steps for *_, steps in engine.policy.verified) == decoded
    assert sum(engine.board.read("draft_length").values()) == decoded
