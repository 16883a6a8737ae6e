"""A prefix cache in a folder: a server that is killed and started again finds it, bit for bit."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.clients import eventually
from engines.sglang.server import FIXED, NEXTN, Answer, Forked
from extras.fleet.folders import damage, files, settled
from extras.fleet.sglang.updating import refused
from needs import need
from qwen3next_plugin.extras.fleet.sglang.folder_flags import LINKER, MODULE
from qwen3next_plugin.extras.fleet.sglang.shared_settings import LINKER_FLAG
from tiers import long_except

pytestmark = pytest.mark.serve

PROMPT = random_prompt(700, seed=21)
TURN = (*PROMPT, *random_prompt(30, seed=22))  # a state of PROMPT's end is one of its prefixes
TOKENS = 24
CASES = {
    "plain": ("--dtype", "float32"),
    "nextn-3": ("--dtype", "float32", *NEXTN, "3"),
    "nextn-3_bfloat16": ("--dtype", "bfloat16", *NEXTN, "3"),
    "two-ranks_nextn-2": ("--dtype", "float32", "--tp-size", "2", *NEXTN, "2"),
}
ALWAYS = ("nextn-3_bfloat16",)  # the others with --long


def flags(folder: Path, folder_bytes: int = 1 << 30) -> tuple[str, ...]:
    settings = {"folder": str(folder), "folder_bytes": folder_bytes}
    linker = {"linker": LINKER, "linker_module_path": MODULE, "linker_extra_config": settings}
    return (
        *(LINKER_FLAG, "--unified-cache-external-linker-backend", "dynamic"),
        *("--unified-cache-external-linker-config", json.dumps(linker)),
        *("--context-length", "2048", "--max-total-tokens", "8192"),
        *("--max-mamba-cache-size", "40"),
    )


@contextmanager
def started(model: Path, folder: Path, *more: str, folder_bytes: int = 1 << 30) -> Iterator[Forked]:
    """A server that is killed at the end."""
    server = Forked(model, *flags(folder, folder_bytes), *(more or CASES["plain"]), env=FIXED)
    try:
        yield server.wait()
    finally:
        server.close()


def ask(server: Forked, prompt: tuple[int, ...] = TURN) -> Answer:
    return server.greedy([prompt], TOKENS, return_logprob=True)[0]


def check_same(found: Answer, cold: Answer) -> None:
    assert (found.token_ids, found.logprobs) == (cold.token_ids, cold.logprobs)


@pytest.mark.parametrize("name", long_except(ALWAYS, CASES))
def test_a_start_after_a_kill_finds_the_prefix(checkpoint, tmp_path, name):
    if name.startswith("two"):
        need("two-cores")
    with started(checkpoint, tmp_path, *CASES[name]) as server:
        cold = ask(server)
        ask(server, PROMPT)
        assert eventually(settled(tmp_path))
    with started(checkpoint, tmp_path, *CASES[name]) as server:
        found = ask(server)
        again = ask(server)  # from its own cache as far as it has a state
    assert (cold.cached, found.cached) == (0, len(PROMPT))
    for each in (found, again):
        check_same(each, cold)
        assert each.accepted >= cold.accepted - 1  # the MTP layer's KV is kept, too


def test_prefixes_that_share_tokens(checkpoint, tmp_path):
    """Wherever the tree was cut; the end of an answer is found, too."""
    shared, ends = random_prompt(900, seed=1), [random_prompt(90, seed=i) for i in (2, 3)]
    prompts = [(*shared, *end) for end in ends]
    folder = tmp_path / "folder"
    folder.mkdir()
    with started(checkpoint, folder) as server:
        turns = [(*prompt, *ask(server, prompt).token_ids, 5, 6) for prompt in prompts]
        warm = [ask(server, turn) for turn in turns]  # from the tree
        assert eventually(settled(folder))
    with started(checkpoint, folder) as server:
        found = [ask(server, turn) for turn in turns]
        salted = server.greedy([turns[0]], TOKENS, return_logprob=True, cache_salt="another")[0]
        server.forget()
        again = ask(server, turns[0])
    (tmp_path / "none").mkdir()
    with started(checkpoint, tmp_path / "none") as server:
        cold = [ask(server, turn) for turn in turns]
    for prompt, *each in zip(prompts, found, warm, cold, strict=True):
        length = len(prompt) + TOKENS - 1
        assert [one.cached for one in each] == [length, length, 0]
        check_same(each[0], each[1])
        assert each[0].token_ids == each[2].token_ids
    assert (salted.cached, again.cached) == (0, len(prompts[0]) + TOKENS - 1)


def test_two_servers_share_a_folder_and_other_weights_have_their_own_files(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    others = write_checkpoint(tmp_path / "others", seed=5)
    with started(checkpoint, folder) as first, started(checkpoint, folder) as second:
        cold = ask(first)
        ask(first, PROMPT)
        assert eventually(settled(folder))
        found = ask(second)
        check_same(found, cold)
        assert found.cached == len(PROMPT)
        path = "/update_weights_from_disk"
        assert "restart the server, or serve without" in refused(
            first, path, model_path=str(others)
        )
    with started(others, folder) as server:
        of_others = ask(server)
    assert of_others.cached == 0
    assert of_others.token_ids != cold.token_ids


def test_files_that_are_damaged_are_computed_again(checkpoint, tmp_path):
    """Whatever is wrong with them: no error, the same answer, and whole files in the end."""
    with started(checkpoint, tmp_path) as server:
        cold = ask(server)
        ask(server, PROMPT)
        assert eventually(settled(tmp_path))
    damage(tmp_path)
    with started(checkpoint, tmp_path) as server:
        damaged = ask(server)
        ask(server, PROMPT)
        assert eventually(settled(tmp_path))
        log = server.process.text()
    # SGLang's own call at start may come before it listens, with a traceback.
    assert not re.search(r'File ".*/qwen3next_plugin/', log), log
    with started(checkpoint, tmp_path) as server:
        found = ask(server)
    assert (damaged.cached, found.cached) == (0, len(PROMPT))
    for each in (damaged, found):
        check_same(each, cold)


def test_a_folder_that_cannot_be_written_any_more_is_one_line(checkpoint, tmp_path):
    """As when the disk is full: answers are the same, and later ones are found in memory."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with started(checkpoint, folder) as server:
        folder.rmdir()
        folder.write_text("not a folder")
        cold = ask(server)
        ask(server, PROMPT)
        again = ask(server)
        log = server.process.text()
    assert log.count("prefixes are not kept") == 1, log
    assert again.cached == len(PROMPT)
    check_same(again, cold)


def test_the_folder_keeps_to_its_limit(checkpoint, tmp_path):
    """The oldest prefixes go; less than the shortest one is refused."""
    small = Forked(checkpoint, *flags(tmp_path, 5000), *CASES["plain"])
    try:
        (least,) = re.findall(r"folder_bytes = 5000: .* at least (\d+) bytes", small.refusal())
    finally:
        small.close()
    limit = 8 * int(least)
    prompts = [random_prompt(200, seed=seed) for seed in range(30, 42)]
    with started(checkpoint, tmp_path, folder_bytes=limit) as server:
        turns = [(*prompt, *ask(server, prompt).token_ids, 5, 6) for prompt in prompts]
        assert eventually(settled(tmp_path))
    assert sum(path.stat().st_size for path in files(tmp_path)) < limit * 9 // 8
    with started(checkpoint, tmp_path, folder_bytes=limit) as server:
        assert not ask(server, turns[0]).cached
        assert ask(server, turns[-1]).cached == 200 + TOKENS - 1
