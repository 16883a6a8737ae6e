"""Policies: lengths within bounds, determinism, memory, and one length for all requests."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_plugin.mtp.costs import Costs, Shape
from qwen3next_plugin.mtp.policy import Adaptive, Fixed

SHAPE = Shape(
    step=1.0,
    step_expert=0.02,
    token=0.03,
    draft=0.3,
    draft_expert=0.002,
    draft_token=0.01,
    experts=64,
    experts_per_token=4,
)


def test_fixed():
    assert Fixed(2).lengths(["a", "b"], [0, 0]) == [2, 2]
    assert Fixed(0).lengths([], []) == []


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_lengths_are_within_bounds_and_a_function_of_what_was_observed(data, k):
    one, two = Adaptive(k, Costs(SHAPE)), Adaptive(k, Costs(SHAPE))
    for _ in range(data.draw(st.integers(1, 15))):
        requests = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
        pending = data.draw(st.tuples(*[st.integers(0, 2000)] * len(requests)))
        lengths = one.lengths(requests, pending)
        assert lengths == two.lengths(requests, pending)
        assert len(lengths) == len(requests)
        assert all(0 <= length <= k for length in lengths)
        seconds = data.draw(st.floats(1e-6, 1e3))
        for policy in (one, two):
            for request, length in zip(requests, lengths, strict=True):
                policy.observe_verify(request, length, length // 2)
            if requests:
                policy.observe_step(len(requests), len(requests) + sum(lengths), seconds)
            if any(lengths):
                policy.observe_draft(len(requests), max(lengths), seconds / 3)


def test_a_forgotten_request_leaves_nothing():
    policy = Adaptive(3, Costs(SHAPE))
    for i in range(10_000):
        policy.lengths([f"r{i}"], [0])
        policy.observe_verify(f"r{i}", 3, i % 4)
        policy.forget(f"r{i}")
    assert policy.snapshot()["requests"] == 0


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_uniform_lengths_are_one_length(data, k):
    policy = Adaptive(k, Costs(SHAPE), uniform=True)
    for _ in range(data.draw(st.integers(1, 15))):
        requests = data.draw(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1))
        lengths = policy.lengths(requests, [0] * len(requests))
        assert len(set(lengths)) == 1
        assert 0 <= lengths[0] <= k
        accepted = data.draw(st.integers(0, k))
        for request, length in zip(requests, lengths, strict=True):
            policy.observe_verify(request, length, min(length, accepted))


def test_uniform_lengths_follow_what_is_accepted():
    """The longest length if every draft is right, none if no draft is."""
    for right, wanted in ((True, 3), (False, 0)):
        policy = Adaptive(3, Costs(SHAPE), uniform=True)
        chosen = []
        for _ in range(400):
            length = policy.lengths(["a", "b"], [0, 0])[0]
            chosen.append(length)
            for request in "ab":
                policy.observe_verify(request, length, length if right else 0)
            policy.observe_step(2, 2 * (1 + length), 1.0 + 0.05 * length)
            if length:
                policy.observe_draft(2, length, 0.2 * length)
        late = chosen[200:]
        assert late.count(wanted) > 0.9 * len(late), late


def test_lengths_follow_what_each_request_accepts():
    """Most drafts are of the request whose drafts are right."""
    policy, drafted = Adaptive(3, Costs(SHAPE)), {"right": 0, "wrong": 0}
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


def test_timings_of_few_pending_tokens_say_nothing_of_their_cost():
    costs = Costs(SHAPE)
    costs.observe_step(8, 8, 1e-3)
    draft = costs.table(8, 3).draft[1]
    for _ in range(5):
        costs.observe_catching_up(8, 1, 2000, draft + 2000 * 1e-6)
        costs.observe_catching_up(8, 1, 9, 0.9 * draft)
    for _ in range(4):  # tables are made anew
        costs.observe_step(8, 8, 1e-3)
    assert costs.table(8, 3).pending == pytest.approx(1e-6)
