"""Pacing: what a step reads of prompts while others wait, by what steps took before."""

import random
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.engines.pacing import (
    AIM,
    FIRST,
    RECENT,
    UNIT,
    LongestStep,
    Pacing,
    Prompt,
    typical,
)

MOST = 2048  # the engine's chunk
LONG = Prompt(8000, 0)


class Machine:
    """Steps that take what a simple machine's take, with a generator's noise."""

    def __init__(self, fixed=0.05, token=0.008, row=0.05, noise=None, full=8000):
        self.fixed, self.token, self.row, self.full = fixed, token, row, full
        self.noise = noise or (lambda: 1.0)

    def seconds(self, rows, tokens, context):
        prompts = (self.fixed + tokens * self.token * (1 + context / self.full)) if tokens else 0
        return (self.row * (rows > 0) + prompts) * self.noise()


def read(pacing, machine, prompts, rows, steps):
    """Run steps of the same prompts, without end; the tokens and seconds of each."""
    done = []
    for _ in range(steps):
        pacing.costs.observe(rows, 0, 0.0, machine.seconds(rows, 0, 0))
        shares = pacing.shares(prompts, rows, MOST) or [min(prompts[0].rest, MOST)]
        context = prompts[shares.index(max(shares))].context
        seconds = machine.seconds(rows, sum(shares), context)
        pacing.costs.observe(rows, sum(shares), context, seconds)
        done.append((sum(shares), seconds))
    return done


def test_the_first_step_is_short_and_the_next_ones_fill_the_budget():
    done = read(Pacing(1.0), Machine(), [LONG], 1, 12)
    assert done[0][0] == FIRST
    assert all(seconds <= 1.05 * AIM for _, seconds in done)
    assert all(seconds > 0.9 * AIM for _, seconds in done[6:])
    assert all(tokens % UNIT == 0 for tokens, _ in done)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("fixed", [0.0, 0.1])
@pytest.mark.parametrize("context", [0, 3000, 100_000])
def test_the_budget_is_kept_on_machines_of_any_kind(seconds, fixed, context):
    prompts = [Prompt(8000, context)]
    done = read(Pacing(seconds), Machine(fixed, 0.001), prompts, 1, 30)
    aim, ends = AIM * seconds, (UNIT, MOST)
    assert all(took <= 1.1 * aim or tokens == UNIT for tokens, took in done[2:])
    assert all(took > 0.75 * aim or tokens in ends for tokens, took in done[15:])


def test_timings_that_are_too_long_do_not_shrink_chunks_for_long():
    randomly = random.Random(5)
    machine = Machine(noise=lambda: 5.0 if randomly.random() < 0.15 else 1.0)
    done = read(Pacing(1.0), machine, [LONG], 1, 200)
    tokens = sorted(tokens for tokens, _ in done[20:])
    assert tokens[len(tokens) // 10] > 75  # 94 fit


def test_a_cold_start_is_forgotten():
    steps = count()
    machine = Machine(noise=lambda: 20.0 if next(steps) < 6 else 1.0)
    done = read(Pacing(1.0), machine, [LONG], 1, 40)
    assert done[2][0] < FIRST
    assert done[-1][0] > 80


def test_a_machine_that_gets_slower_is_followed():
    pacing = Pacing(1.0)
    read(pacing, Machine(token=0.002), [LONG], 1, 30)
    done = read(pacing, Machine(token=0.008), [LONG], 1, 30)
    assert all(seconds < 1.2 * AIM for _, seconds in done[20:])
    done = read(pacing, Machine(token=0.002), [LONG], 1, RECENT)
    assert done[-1][1] > 0.85 * AIM


def test_a_long_context_counts_before_it_was_measured():
    pacing = Pacing(1.0)
    read(pacing, Machine(), [LONG], 1, 20)
    done = read(pacing, Machine(), [Prompt(8000, 64_000)], 1, 10)
    assert all(seconds < 1.1 for _, seconds in done)
    assert done[-1][0] == UNIT  # two would take 1.4 s
    (after,) = read(pacing, Machine(), [LONG], 1, 1)
    assert after[1] > 0.85 * AIM  # short contexts are not forgotten


def test_decoding_takes_its_part_of_the_budget_but_not_all():
    few, many, most = (
        read(Pacing(1.0), Machine(row=row), [LONG], 1, 30)[-1] for row in (0.0, 0.5, 3.0)
    )
    assert few[1] == pytest.approx(AIM, abs=0.1)
    assert many[1] == pytest.approx(AIM, abs=0.1)
    assert few[0] > many[0] > most[0] >= UNIT


def test_a_prompt_alone_is_read_as_the_engine_does():
    pacing = Pacing(1.0)
    assert pacing.shares([], 0, MOST) is None
    assert pacing.shares([LONG], 0, MOST) is None
    assert pacing.shares([LONG], 1, MOST) == [FIRST]
    assert pacing.shares([Prompt(20, 0)], 1, MOST) == [20]
    assert pacing.shares([Prompt(20, 0), Prompt(9, 0)], 0, MOST) == [20, 9]
    assert Pacing(0).shares([LONG, Prompt(20, 0)], 1, MOST) is None


def test_long_prompts_together_have_the_engines_chunks_in_turns():
    pacing = Pacing(1.0)
    two = [LONG, Prompt(5000, 0)]
    shares = [pacing.shares(two, 0, MOST) for _ in range(4)]
    assert shares == [[MOST, 0], [0, MOST]] * 2


def test_a_short_prompt_is_somebody_who_waits():
    pacing = Pacing(1.0)
    assert pacing.shares([LONG, Prompt(40, 0)], 0, MOST) == [FIRST, 0]
    assert pacing.shares([LONG, Prompt(40, 0)], 0, MOST) == [24, 40]


def test_a_short_prompt_waits_for_one_step_of_a_long_one():
    pacing = Pacing(1.0)
    for _ in range(5):
        assert pacing.shares([LONG], 1, MOST) == [FIRST]
    assert pacing.shares([LONG, Prompt(FIRST, 0)], 1, MOST) == [0, FIRST]


def test_the_oldest_never_starves():
    """Whatever comes after it."""
    pacing, read_of_oldest = Pacing(1.0), 0
    for _ in range(100):
        shares = pacing.shares([LONG, *[Prompt(30, 0)] * 9], 3, MOST)
        assert sum(shares) == FIRST
        read_of_oldest += shares[0]
    assert read_of_oldest >= 50 * FIRST


@given(
    st.lists(st.builds(Prompt, st.integers(1, 9000), st.integers(0, 200_000)), max_size=8),
    st.integers(0, 64),
    st.integers(UNIT, 8192),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5000), st.floats(1e-4, 100)), max_size=30),
)
def test_any_step_makes_progress_within_the_engines_chunk(prompts, rows, most, steps):
    pacing = Pacing(1.0)
    for decoding, tokens, seconds in steps:
        pacing.costs.observe(decoding, tokens, 0.0, seconds)
    shares = pacing.shares(prompts, rows, most)
    if shares is None:
        return
    rests = [prompt.rest for prompt in prompts]
    assert all(0 <= share <= rest for share, rest in zip(shares, rests, strict=True))
    assert min(UNIT, rests[pacing.first]) <= sum(shares) <= pacing.limit <= most
    assert shares[pacing.first]


def test_ranks_agree_on_the_first_ones_number():
    pacing = Pacing(1.0, agree=lambda _: 40)
    assert pacing.shares([LONG], 1, MOST) == [40]


def test_typical():
    assert typical([3.0]) == 3
    assert typical([9.0, 3.0]) == 3
    assert typical([9.0, 3.0, 4.0]) == 4


def test_the_longest_step_is_forgotten_after_a_minute():
    longest = LongestStep()
    found = [longest.observe(now, s) for now, s in ((0, 1), (10, 7), (20, 3), (71, 2), (200, 1))]
    assert found == [7 if i == 1 else x for i, x in enumerate([1, 7, 7, 3, 1])]
