"""A prefix cache in a folder: an engine that is killed and started again finds it, bit for bit."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import Output
from engines.clients import eventually
from engines.vllm.offline import Offline
from extras.fleet.folders import damage, settled
from needs import need
from qwen3next_plugin.extras.fleet.vllm.folder_flags import SPEC
from tiers import long_except

pytestmark = pytest.mark.serve

BLOCK = 128  # tokens, of the random checkpoint
PROMPT = random_prompt(5 * BLOCK + 60, seed=21)
TOKENS = 24
ENGINES = (f"{os.getpid()}-{i}" for i in count())  # names that no other test run uses
CASES = {
    "plain": {},
    "mtp-3": {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}},
    "mtp-3_units-of-8_bfloat16": {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
        "prefix_match_unit": 8,
        "dtype": "bfloat16",
        "max_num_batched_tokens": 200,
    },
    "two-ranks_mtp-2": {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
        "tensor_parallel_size": 2,
    },
}
ALWAYS = [name for name in CASES if name not in ("plain", "mtp-3")]  # the others with --long


def connector(folder: Path, **settings: Any) -> dict[str, Any]:
    own = {
        "spec_name": SPEC,
        "spec_module_path": "qwen3next_plugin.extras.fleet.vllm.folder",
        "folder": str(folder),
        "folder_bytes": 1 << 30,
        "cpu_bytes_to_use": 1 << 26,
    }
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "engine_id": next(ENGINES),
        "kv_connector_extra_config": own | settings,
    }


@contextmanager
def started(model: Path, folder: Path, settings: Any = (), **flags: Any) -> Iterator[Offline]:
    """An engine that is killed at the end."""
    defaults = {"dtype": "float32", "max_model_len": 2048}
    transfer = connector(folder, **dict(settings))
    engine = Offline(model, **(defaults | flags), kv_transfer_config=transfer)
    try:
        yield engine
    finally:
        engine.process.stop(signal.SIGKILL)


def ask(engine: Offline, prompt: tuple[int, ...] = PROMPT) -> Output:
    return engine.greedy([prompt], TOKENS, logprobs=0)[0]


@pytest.mark.parametrize("name", long_except(ALWAYS, CASES))
def test_a_start_after_a_kill_finds_the_prefix(checkpoint, tmp_path, name):
    if name.startswith("two"):
        need("two-cores")
    with started(checkpoint, tmp_path, **CASES[name]) as engine:
        cold = ask(engine)
        assert eventually(settled(tmp_path))
    with started(checkpoint, tmp_path, **CASES[name]) as engine:
        found = ask(engine)
        log = engine.process.text()
    assert cold.cached == 0
    assert found.cached >= 4 * BLOCK, log  # drafts cost one
    assert found.token_ids == cold.token_ids
    assert found.logprobs == cold.logprobs
    assert not names_in_memory()


def names_in_memory() -> list[str]:
    """Of the engines that this process has started."""
    return [path.name for path in Path("/dev/shm").glob(f"vllm_offload_qwen3next_{os.getpid()}-*")]


def test_two_engines_share_a_folder_and_other_weights_have_their_own_files(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    others = write_checkpoint(tmp_path / "others", seed=5)
    with started(checkpoint, folder) as first, started(checkpoint, folder) as second:
        cold = ask(first)
        assert eventually(settled(folder))
        found = ask(second)
        again = ask(second)  # from its own cache
    with started(others, folder) as engine:
        of_others = ask(engine)
    assert found.cached == again.cached == 5 * BLOCK
    assert (found.token_ids, found.logprobs) == (cold.token_ids, cold.logprobs)
    assert of_others.cached == 0
    assert of_others.token_ids != cold.token_ids


def test_files_that_are_damaged_are_computed_again(checkpoint, tmp_path):
    """Whatever is wrong with them: no error, the same answer, and whole files in the end."""
    with started(checkpoint, tmp_path) as engine:
        cold = ask(engine)
        assert eventually(settled(tmp_path))
    damage(tmp_path)
    found = []
    while not found or (not found[-1].cached and len(found) < 3):  # what is read is removed
        with started(checkpoint, tmp_path) as engine:
            found.append(ask(engine))
            assert eventually(settled(tmp_path))
            log = engine.process.text()
        assert "ERROR" not in log, log
    assert [output.cached for output in found] in ([0, 5 * BLOCK], [0, 0, 5 * BLOCK])
    for each in found:
        assert (each.token_ids, each.logprobs) == (cold.token_ids, cold.logprobs)


def test_a_folder_that_cannot_be_written_any_more_is_one_line(checkpoint, tmp_path):
    """As when the disk is full: answers are the same, and later ones are found in memory."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with started(checkpoint, folder) as engine:
        folder.rmdir()
        folder.write_text("not a folder")
        prompts = [random_prompt(3 * BLOCK + 5, seed=seed) for seed in range(40, 44)]
        cold = [ask(engine, prompt) for prompt in prompts]
        engine.forget()
        again = [ask(engine, prompt) for prompt in prompts]
        log = engine.process.text()
    assert log.count("prefixes are not kept") == 1, log
    assert "ERROR" not in log, log
    assert [output.cached for output in again] == [3 * BLOCK] * 4
    assert [o.logprobs for o in again] == [o.logprobs for o in cold]


@pytest.mark.parametrize("setting", ["folder_bytes", "cpu_bytes_to_use"])
def test_a_limit_that_no_prefix_fits_in_is_refused(checkpoint, tmp_path, setting):
    """When the size of a block is known, so with the model loaded."""
    with (
        pytest.raises(AssertionError, match=rf"{setting} = 5000: .* bytes"),
        started(checkpoint, tmp_path, {setting: 5000}),
    ):
        pass
    assert not names_in_memory()


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "mtp-3"])
def test_the_least_folder_holds_the_last_prompt(checkpoint, tmp_path, name):
    with (
        pytest.raises(AssertionError, match="folder_bytes = 5000") as refusal,
        started(checkpoint, tmp_path, {"folder_bytes": 5000}, **CASES[name]),
    ):
        pass
    (least,) = re.findall(r"at least (\d+) bytes", str(refusal.value))
    prompts = [random_prompt(2 * BLOCK + 9, seed=seed) for seed in (50, 51)]
    settings = {"folder_bytes": int(least)}
    with started(checkpoint, tmp_path, settings, **CASES[name]) as engine:
        cold = [ask(engine, prompt) for prompt in prompts][-1]
        assert eventually(settled(tmp_path))
    with started(checkpoint, tmp_path, settings, **CASES[name]) as engine:
        found = ask(engine, prompts[-1])
    assert found.cached >= BLOCK
    assert (found.token_ids, found.logprobs) == (cold.token_ids, cold.logprobs)
