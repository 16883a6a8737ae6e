"""Ranks that agree: what one of them refuses, all do, and each knows why."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import destroy_process_group, group, init_process_group

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet.agreement import refusal

RANKS = 2
FORK = multiprocessing.get_context("fork")


def ask(rank: int, refusing: dict[int, Exception], meeting: Path, answers: Any) -> None:
    """A rank, in a process of its own: asks the others and hands over what it learns."""

    def check() -> None:
        if rank in refusing:
            raise refusing[rank]

    init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    answers.put((rank, refusal(check, group.WORLD)))
    destroy_process_group()


@pytest.mark.parametrize(
    ("refusing", "said"),
    [
        ({}, None),
        ({1: ConfigError("no such folder")}, "rank 1: no such folder"),
        ({0: KeyError(), 1: ConfigError("no such folder")}, "rank 0: KeyError()"),
    ],
    ids=["none", "the second", "both"],
)
def test_all_ranks_say_what_the_first_that_refuses_says(refusing, said, tmp_path):
    answers = FORK.Queue()
    ranks = [
        FORK.Process(target=ask, args=(rank, refusing, tmp_path / "meeting", answers))
        for rank in range(RANKS)
    ]
    for each in ranks:
        each.start()
    found = dict(answers.get(timeout=600) for _ in ranks)
    for each in ranks:
        each.join()
    assert found == dict.fromkeys(range(RANKS), said)
