"""Weights that change while serving: as a fresh start with them, and the old ones if refused."""

import json
import re
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import bad_weights
from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from engines.vllm.server import ForkedTwice
from extras.fleet.other_weights import CASES as OF_BOTH
from extras.fleet.other_weights import (
    FAULT,
    IN_MAKE_TEST,
    INVARIANT,
    PROMPTS,
    TIED,
    WRONG,
    Case,
    answers_across,
    write,
)
from needs import needs
from quantised import pack_checkpoint
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve

DRAFTS = {"method": "mtp", "num_speculative_tokens": 3}
FLAGS: dict[str, Any] = {"max_model_len": 1024, "speculative_config": DRAFTS}
CASES = OF_BOTH | {
    "float32_compiled": OF_BOTH["float32"],
    "packed_compiled": OF_BOTH["packed"],
    "packed_tied": Case("bfloat16", TIED, INVARIANT),
    "int4_compiled": OF_BOTH["int4"],
}


def answers(engine: Offline) -> tuple[list, list]:
    """Tokens with their log-probabilities, and every draft, with nothing cached."""
    engine.inside("draft", 3)
    outputs = engine.greedy(PROMPTS, 24, **LOGPROBS)
    return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in outputs], engine.inside("drafts")


@pytest.mark.parametrize("case", long_except(IN_MAKE_TEST, CASES))
def test_trunk_mtp_layer_and_draft_head_are_those_of_a_fresh_start(case, tmp_path):
    dtype, _, env = CASES[case]
    folders = CASES[case].write_two(tmp_path)
    flags = FLAGS | {"dtype": dtype, "enforce_eager": "compiled" not in case}
    found, fresh = [], []
    for first in (0, 1):
        engine = Offline(folders[first], env=env, **flags)
        try:
            fresh.append(answers(engine))
            engine.inside("reload", str(folders[1 - first]))
            found.insert(0, answers(engine))
        finally:
            engine.close()
    assert fresh[0][0] != fresh[1][0]
    assert any(fresh[1][1])
    assert found == fresh


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return [write(tmp_path_factory.mktemp(f"seed-{seed}"), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(folders) -> Iterator[Offline]:
    engine = Offline(folders[0], dtype="float32", **FLAGS)
    yield engine
    engine.close()


def test_no_prefix_of_the_old_weights_is_served(engine, folders):
    long = [random_prompt(300, seed=5)]
    old = engine.greedy(long, 24)
    assert engine.greedy(long, 24)[0].cached
    engine.inside("reload", str(folders[1]))
    new = engine.greedy(long, 24)
    assert not new[0].cached
    engine.inside("reload", str(folders[0]))
    assert engine.greedy(long, 24)[0].token_ids == old[0].token_ids != new[0].token_ids


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_leaves_the_old_weights(engine, folders, tmp_path, wrong):
    before = answers(engine)
    with pytest.raises(AssertionError, match=re.escape(wrong.message)):
        engine.inside("reload", str(wrong.write(folders[1], tmp_path)))
    assert answers(engine) == before


def test_a_packed_checkpoint_is_not_reloaded(folders, tmp_path):
    packed = pack_checkpoint(folders[0], tmp_path / "out", "int8")
    engine = Offline(packed, **FLAGS)
    try:
        before = answers(engine)
        with pytest.raises(AssertionError, match="a packed checkpoint is loaded once"):
            engine.inside("reload", str(folders[1]))
        assert answers(engine) == before
    finally:
        engine.close()


@needs("two-cores")
def test_two_ranks_refuse_together_and_reload_together(folders, tmp_path):
    prompts = [random_prompt(n, seed=12) for n in (1, 130)]
    engine = Offline(folders[0], dtype="float32", tensor_parallel_size=2, **FLAGS)
    try:
        for _ in range(2):
            with pytest.raises(AssertionError, match=r"rank 0: .* tensors are missing"):
                engine.inside("reload", str(tmp_path))
        check_greedy(Reference(folders[0]), prompts, engine.greedy(prompts, 10, **LOGPROBS))
        engine.inside("reload", str(folders[1]))
        check_greedy(Reference(folders[1]), prompts, engine.greedy(prompts, 10, **LOGPROBS))
    finally:
        engine.close()


@pytest.fixture(scope="module")
def server(folders) -> Iterator[ForkedTwice]:
    flags = ("--dtype", "float32", "--enforce-eager", "--speculative-config", json.dumps(DRAFTS))
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    server = ForkedTwice(folders[0], *flags, "--max-model-len", "4096", env=env).wait()
    yield server
    server.close()


def reload(server: ForkedTwice, folder: Path) -> None:
    kwargs = {"weights_path": str(folder)}
    server.post("/collective_rpc", method="reload_weights", kwargs=kwargs)


def continued(server: ForkedTwice, prompt: list[int], tokens: int) -> list[int]:
    """The tokens of a greedy continuation."""
    answer = server.client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return answer.choices[0].token_ids


def test_a_running_request_goes_on_by_the_new_weights(server, folders):
    prompt = list(random_prompt(40, seed=7))
    old, found = answers_across(
        lambda tokens: continued(server, prompt, tokens),
        lambda: server.metrics()["vllm:num_requests_running"],
        lambda: reload(server, folders[1]),
        lambda: reload(server, folders[0]),
    )
    same = next(i for i, (a, b) in enumerate(zip(old, found, strict=True)) if a != b)
    assert same
    assert continued(server, prompt + found[:same], len(old) - same) == found[same:]
    reload(server, folders[0])
    assert continued(server, prompt, 100) == old[:100]


def test_a_refusal_answers_an_error_and_serving_goes_on(server, tmp_path):
    prompt = list(random_prompt(20, seed=8))
    before = continued(server, prompt, 50)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        reload(server, tmp_path / "none")
    assert "none: no such folder" in server.process.text()
    assert continued(server, prompt, 50) == before


def test_asleep_it_keeps_its_weights(server):
    """vLLM frees no memory on a CPU: it only pauses."""
    prompt = list(random_prompt(20, seed=9))
    before = continued(server, prompt, 50)
    server.post("/sleep?level=1")
    assert "true" in server.get("/is_sleeping")
    server.post("/wake_up")
    assert continued(server, prompt, 50) == before


def test_what_is_found_as_weights_load_ends_the_server(tmp_path):
    good, bad = bad_weights.write_good_and_faulty(tmp_path, FAULT)
    env = {"VLLM_SERVER_DEV_MODE": "1"}
    server = ForkedTwice(good, "--enforce-eager", "--max-model-len", "512", env=env).wait()
    with suppress(OSError):
        reload(server, bad)
    log = server.refusal()
    assert "other weights failed to load, so this worker ends" in log
    assert re.search(bad_weights.FAULTS[FAULT].message, log)
