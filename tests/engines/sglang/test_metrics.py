"""A board on SGLang's metrics page."""

from math import nan

import pytest
from prometheus_client import REGISTRY

from qwen3next_plugin.mtp.metrics import PLAIN, VERIFY, Board

LABELS = {"model_name": "m", "tp_rank": 0}


@pytest.fixture(scope="module")
def publisher():
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.metrics import MetricsPublisher

    board = Board(2)
    board.set("acceptance", [nan, nan])
    return MetricsPublisher(board, LABELS)


def shown(name: str, **labels: str) -> float | None:
    labels = {label: str(value) for label, value in (LABELS | labels).items()}
    return REGISTRY.get_sample_value(f"sglang:qwen3next_{name}", labels)


def test_counts_begin_at_zero_and_estimates_when_they_are_known(publisher):
    publisher.publish()
    assert shown("steps_total", kind=VERIFY) == shown("draft_length_count") == 0
    assert shown("state_pages") == 0
    assert shown("acceptance", position="1") is None
    publisher.board.set("acceptance", [0.5, nan])
    publisher.publish()
    assert [shown("acceptance", position=n) for n in "12"] == [0.5, None]


def test_numbers_are_those_of_the_board(publisher):
    board = publisher.board
    for _ in range(3):
        board.add("steps", value=PLAIN)
        board.add("seconds", 0.25, VERIFY)
        board.add("draft_length", 5, 2)
        board.add("draft_length", 2, 0)
        board.set("state_pages", [7])
        publisher.publish()
        publisher.publish()  # nothing new
    assert shown("steps_total", kind=PLAIN) == 3
    assert shown("seconds_total", kind=VERIFY) == 0.75
    assert [shown("draft_length_bucket", le=f"{n}.0") for n in range(3)] == [6, 6, 21]
    assert shown("draft_length_sum") == 30
    assert shown("draft_length_count") == 21
    assert shown("state_pages") == 7
