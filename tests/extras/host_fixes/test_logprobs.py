"""How many log-probabilities a request may ask for, and how long its answer may then be."""

import pytest

from qwen3next_plugin.extras.host_fixes.logprobs import MOST, answer_tokens


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        ({"prompt": 0, "each": 0, "n": 128, "tokens": 10**6}, 10**6),  # none
        ({"prompt": MOST, "each": 0, "n": 1, "tokens": 10**6}, 10**6),  # of the prompt only
        ({"prompt": 3 * 262_144, "each": 1, "n": 1, "tokens": 100}, 100),
        ({"prompt": 0, "each": 21, "n": 2, "tokens": MOST // 42}, MOST // 42),
        # Without max_tokens, the answer has as many as fit.
        ({"prompt": 0, "each": 21, "n": 1, "tokens": 10**6, "room": 10**6}, MOST // 21),
        ({"prompt": 100, "each": 21, "n": 4, "tokens": 10**6, "room": 10**6}, (2**18 - 100) // 21),
    ],
)
def test_an_answer_is_as_long_as_fits(asked, tokens):
    assert answer_tokens("logprobs", **{"room": 2**30} | asked) == tokens


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": 3000 * 1001, "each": 0, "n": 1, "tokens": 1},
        {"prompt": MOST // 4 + 1, "each": 0, "n": 4, "tokens": 1},
        {"prompt": MOST, "each": 1, "n": 1, "tokens": 1},
        {"prompt": 0, "each": 21, "n": 128, "tokens": 3000},
        {"prompt": MOST, "each": 1, "n": 1, "tokens": 100, "room": 100},  # none fits
        {"prompt": 0, "each": 1, "n": 1, "tokens": 101, "most": 100},  # beside other prompts
    ],
)
def test_too_many_are_refused(asked):
    allowed = asked.get("most", MOST)
    with pytest.raises(ValueError, match=f"^top asks for .* of which {allowed} are left"):
        answer_tokens("top", **{"room": 2**30} | asked)
