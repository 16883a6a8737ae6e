"""Policies: lengths within bounds, determinism, and memory."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import serve
from traces import CHEAP, LOW, Case, steady

from qwen3next_plugin.mtp.acceptance import Acceptance
from qwen3next_plugin.mtp.costs import COLD, Costs
from qwen3next_plugin.mtp.policy import Adaptive, Fixed


def test_fixed():
    assert Fixed(2).lengths(["a", "b"], [0, 0]) == [2, 2]
    assert Fixed(0).lengths([], []) == []


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_lengths_are_within_bounds_and_a_function_of_what_was_observed(data, num_drafts):
    one, two = Adaptive(num_drafts, Costs()), Adaptive(num_drafts, Costs())
    for _ in range(data.draw(st.integers(1, 15))):
        requests = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
        pending = data.draw(st.tuples(*[st.integers(0, 2000)] * len(requests)))
        lengths = one.lengths(requests, pending)
        assert lengths == two.lengths(requests, pending)
        assert len(lengths) == len(requests)
        assert all(0 <= length <= num_drafts for length in lengths)
        seconds = data.draw(st.floats(1e-6, 1e3))
        for policy in (one, two):
            for request, length in zip(requests, lengths, strict=True):
                policy.observe_verify(request, length, length // 2)
            if requests:
                policy.observe_step(len(requests), len(requests) + sum(lengths), seconds)
            if any(lengths):
                policy.observe_draft(len(requests), max(lengths), seconds / 3)


def test_a_forgotten_request_leaves_nothing():
    policy = Adaptive(3, Costs())
    for i in range(10_000):
        policy.lengths([f"r{i}"], [0])
        policy.observe_verify(f"r{i}", 3, i % 4)
        policy.forget(f"r{i}")
    assert not policy._requests


def test_lengths_follow_what_each_request_accepts():
    """Most drafts are of the request whose drafts are right."""
    policy, drafted = Adaptive(3, Costs()), {"right": 0, "wrong": 0}
    for _ in range(400):
        lengths = policy.lengths(list(drafted), [0, 0])
        for request, length in zip(drafted, lengths, strict=True):
            drafted[request] += length
            policy.observe_verify(request, length, length if request == "right" else 0)
        policy.observe_step(2, 2 + sum(lengths), 1.0 + 0.1 * sum(lengths))
        if any(lengths):
            policy.observe_draft(2, max(lengths), 0.1 * max(lengths))
    assert drafted["right"] > 400 * 2.4
    assert drafted["wrong"] < 400


@pytest.mark.parametrize("chances", [LOW, (0.5, 0.05, 0.05, 0.05)], ids=str)
def test_acceptance_is_learned(chances):
    """What all requests accept, far from the 0.8 that is assumed at first."""
    policy = Adaptive(len(chances), Costs())
    serve(Case(CHEAP, steady(chances)).trace(4), policy)
    found = policy.snapshot()["acceptance"]
    assert found[:2] == pytest.approx(chances[:2], abs=0.1)


def test_a_request_may_draft_nothing_for_long():
    policy = Adaptive(3, Costs())
    policy.lengths(["a"], [0])
    policy.observe_verify("a", 3, 0)
    for _ in range(100_000):
        policy.observe_verify("a", 0, 0)
    assert 0 <= policy.lengths(["a"], [0])[0] <= 3


@pytest.mark.parametrize("seen", [0, 3])
def test_steps_without_drafts_may_be_counted_at_once(seen):
    each, at_once = Acceptance(3), Acceptance(3)
    for one in (each, at_once):
        one.observe(seen, seen // 2)
    for _ in range(7):
        each.observe(0, 0)
    at_once.observe(0, 0, steps=7)
    assert at_once.tokens == each.tokens
    assert at_once.seen == pytest.approx(each.seen)
    assert at_once.accepted == pytest.approx(each.accepted)


def test_timings_of_few_pending_tokens_say_nothing_of_their_cost():
    costs = Costs()
    costs.observe_step(8, 8, 1e-3)
    draft = costs.table(8, 3).draft[1]
    for _ in range(COLD):
        costs.observe_draft(8, 1, 0, draft)
    for _ in range(5):
        costs.observe_draft(8, 1, 2000, draft + 2000 * 1e-6)
        costs.observe_draft(8, 1, 9, 0.9 * draft)
    for _ in range(4):  # tables are made anew
        costs.observe_step(8, 8, 1e-3)
    assert costs.table(8, 3).pending == pytest.approx(1e-6)


def test_slow_first_verify_steps_do_not_end_drafts():
    """As when experts are read from the disk at first: 3 to 8 times the time that they take later.

    Three drafts pay: 2.9 tokens in 1.7 plain steps.
    """
    policy, chance, slow = Adaptive(3, Costs()), random.Random(0), 12
    drafts: list[int] = []
    policy.observe_step(1, 1, 0.1)
    for _ in range(100):
        (length,) = policy.lengths(["a"], [0])
        drafts.append(length)
        seconds = 0.073 * (1 + 0.16 * length)
        if length and slow:
            seconds, slow = seconds * chance.uniform(3, 8), slow - 1
        accepted = next((j for j in range(length) if chance.random() > 0.8), length)
        policy.observe_verify("a", length, accepted)
        policy.observe_step(1, 1 + length, seconds)
        if length:
            policy.observe_draft(1, length, 0.008 * length)
    assert sum(drafts[20:]) > 2.5 * len(drafts[20:])
