"""Weights that change while serving: as a fresh start with them, and the old ones if refused."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import bad_weights
from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.sglang.server import NEXTN, Forked, Server
from extras.fleet.other_weights import (
    CASES,
    FAULT,
    IN_MAKE_TEST,
    PROMPTS,
    WRONG,
    answers_across,
    write,
)
from extras.fleet.sglang.updating import LOGPROBS, answers, read, refused, send, start
from needs import needs
from quantised import pack_checkpoint
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve


@pytest.mark.parametrize("case", long_except(IN_MAKE_TEST, CASES))
def test_trunk_mtp_layer_and_draft_head_are_those_of_a_fresh_start(case, tmp_path):
    dtype, _, env = CASES[case]
    folders = CASES[case].write_two(tmp_path)
    found, fresh, again = [], [], []
    for first in (0, 1):
        server = start(folders[first], dtype, env)
        try:
            fresh.append(answers(server))
            read(server, folders[1 - first])
            found.insert(0, answers(server))
            send(server, folders[first])
            again.append(answers(server))
        finally:
            server.close()
    assert fresh[0] != fresh[1]
    assert sum(answer.accepted for answer in fresh[1])
    assert found == again == fresh


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return [write(tmp_path_factory.mktemp(f"seed-{seed}"), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Server]:
    server = start(folders[0])
    yield server
    server.close()


@pytest.mark.parametrize("change", [read, send])
def test_no_prefix_of_the_old_weights_is_served(server, folders, change):
    prompt = random_prompt(300, seed=5)
    turn = (*prompt, *server.greedy([prompt], 24)[0].token_ids, 5, 6, 7)
    old = server.greedy([turn], 24)[0]
    assert old.cached
    change(server, folders[1])
    new = server.greedy([turn], 24)[0]
    assert not new.cached
    change(server, folders[0])
    assert server.greedy([turn], 24)[0].token_ids == old.token_ids != new.token_ids


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_leaves_the_old_weights(server, folders, tmp_path, wrong):
    before = server.greedy(PROMPTS, 24)
    path = str(wrong.write(folders[1], tmp_path))
    assert wrong.message in refused(server, "/update_weights_from_disk", model_path=path)
    server.forget()
    assert server.greedy(PROMPTS, 24) == before


def test_no_folder_is_refused(server, tmp_path):
    there = str(tmp_path / "none")
    assert "none: no such folder" in refused(server, "/update_weights_from_disk", model_path=there)


@pytest.mark.parametrize("change", long_except([send], [read, send]))
def test_a_running_request_goes_on_after_a_pause(server, folders, change):
    """Retracted, its tokens so far are read again by the new weights."""
    prompt = random_prompt(40, seed=7)

    def ask(tokens: int) -> list[int]:
        server.forget()
        return list(server.greedy([prompt], tokens)[0].token_ids)

    def in_a_pause() -> None:
        server.post("/pause_generation", mode="retract")
        change(server, folders[1])
        server.post("/continue_generation")

    old, found = answers_across(
        ask, server.unfinished, in_a_pause, lambda: change(server, folders[0])
    )
    same = next(i for i, (a, b) in enumerate(zip(old, found, strict=True)) if a != b)
    begun = (*prompt, *found[:same])
    assert list(server.greedy([begun], len(old) - same)[0].token_ids) == found[same:]
    change(server, folders[0])
    assert ask(100) == old[:100]


def test_a_packed_checkpoint_is_not_updated(folders, tmp_path):
    packed = pack_checkpoint(folders[0], tmp_path / "out", "int8")
    server = start(packed)
    try:
        before = server.greedy(PROMPTS, 24)
        path = str(folders[1])
        assert "is loaded once" in refused(server, "/update_weights_from_disk", model_path=path)
        assert "is loaded once" in refused(server, "/begin_weight_update")
        server.forget()
        assert server.greedy(PROMPTS, 24) == before
    finally:
        server.close()


@needs("two-cores")
def test_two_ranks_refuse_together_and_update_together(folders, tmp_path):
    prompts = [random_prompt(n, seed=12) for n in (1, 65)]
    small = ("--max-total-tokens", "4096", "--max-mamba-cache-size", "20", *NEXTN, "3")
    server = Forked(folders[0], "--tp-size", "2", "--dtype", "float32", *small).wait()
    try:
        said = refused(server, "/update_weights_from_disk", model_path=str(tmp_path))
        assert re.match(r"rank 0: .* tensors are missing", said)
        found = server.greedy(prompts, 10, **LOGPROBS)
        check_greedy(Reference(folders[0]), prompts, found)
        read(server, folders[1])
        found = server.greedy(prompts, 10, **LOGPROBS)
        check_greedy(Reference(folders[1]), prompts, found)
        send(server, folders[0], ranks=2)
        found = server.greedy(prompts, 10, **LOGPROBS)
        check_greedy(Reference(folders[0]), prompts, found)
    finally:
        server.close()


def test_what_is_found_as_weights_load_ends_the_server(tmp_path):
    good, bad = bad_weights.write_good_and_faulty(tmp_path, FAULT)
    server = Forked(good, "--dtype", "float32", "--context-length", "512").wait()
    with suppress(OSError):
        server.post("/update_weights_from_disk", model_path=str(bad))
    assert re.search(bad_weights.FAULTS[FAULT].message, server.refusal())
