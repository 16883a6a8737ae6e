"""What is asked of an engine's numbers fails where it should."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engines.checks import TOLERANCE, Output, check_greedy, check_no_farther

PROMPT, ANSWER = (3, 4, 5), (6, 7)
EXACT = torch.tensor([-1.0, -2.0, -3.0, -4.0])
OUTPUT = Output(
    token_ids=ANSWER,
    logprobs=(-3.0, -4.0),
    prompt_logprobs=(-1.0, -2.0),
    cached=0,
    finish_reason="length",
    text="",
)
REFERENCE = SimpleNamespace(greedy_logprobs=lambda ids: (ids[1:], EXACT))


def test_numbers_that_were_not_asked_for_may_be_missing():
    check_greedy(REFERENCE, [PROMPT], [OUTPUT])
    check_greedy(REFERENCE, [PROMPT], [replace(OUTPUT, logprobs=None, prompt_logprobs=None)])


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("found", [(), (-1.0,), (-3.0, float("nan"))], ids=str)
def test_numbers_that_were_asked_for_may_not(name, found):
    with pytest.raises(AssertionError):
        check_greedy(REFERENCE, [PROMPT], [replace(OUTPUT, **{name: found})])


def test_one_number_that_is_off_fails():
    off = (-1.0, -2.0 - 2 * TOLERANCE)
    with pytest.raises(AssertionError, match="prompt of 3"):
        check_greedy(REFERENCE, [PROMPT], [replace(OUTPUT, prompt_logprobs=off)])


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_farther_is_seen(seed):
    """Of as many tokens as test_dtypes.py reads, with errors that come and go."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(4400, generator=generator) for _ in range(2))
    exact = [torch.zeros(4400)]
    check_no_farther([ours], [theirs], exact)
    with pytest.raises(AssertionError):
        check_no_farther([1.2 * ours], [theirs], exact)
