"""The recorder and the replay: what is kept of events, and policies on a recording made here."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.block_model import TINY
from benchmarks.mtp import record
from benchmarks.mtp.replay import COLD, RECORDED, adaptive, load, shares
from tiers import long_except

K = 3
# Of the best fixed length in hindsight, at least, on recordings: of all steps, of the first 100,
# and of all if the first drafts are slow.
WHOLE, EARLY, SLOW = 0.98, 0.95, 0.98
PATHS = {path.stem: path for path in sorted(RECORDED.glob("*.json"))}
ALWAYS = ("sglang-block-4", "sglang-tiny-16", "vllm-block-1", "vllm-tiny-4")  # the others: --long


def recording(tmp_path, batch: int, *, right: int):
    """Steps and drafts in ms, with noise, of a machine where each draft token costs a little."""
    chance = random.Random(0)
    steps, drafts = [], []
    for at in range(600):
        passes = at % (K + 1)
        noise = chance.uniform(0.8, 1.2) * (3 if chance.random() < 0.03 else 1)
        steps.append([at, batch * (1 + passes), round(1e4 * noise * (1 + 0.1 * passes))])
        if passes:
            drafts.append([at, passes, batch * passes, round(2e3 * noise * passes)])
    found = {
        "engine": "vllm",
        "model": TINY.name,
        "batch": batch,
        "num_drafts": K,
        "steps": steps,
        "drafts": drafts,
    }
    path = tmp_path / "made.json"
    path.write_text(json.dumps(found | {"pending": 20.0, "runs": [str(right) * 60] * 3}))
    return load(path)


@pytest.mark.parametrize("cold", [0, COLD])
@pytest.mark.parametrize("right", [0, 1, K])
@pytest.mark.parametrize("batch", long_except([4], [1, 4]))
def test_adaptive_is_close_to_the_best_fixed_length(tmp_path, batch, right, cold):
    made = recording(tmp_path, batch, right=right)
    whole, early = shares(made, adaptive, cold)
    assert whole >= (0.9 if cold else 0.95)
    assert early >= 0.8


def test_recordings_are_there():
    models = {"tiny": (1, 4, 16), "block": (1, 4)}
    assert {*PATHS} == {
        f"{engine}-{model}-{batch}"
        for engine in ("vllm", "sglang")
        for model, batches in models.items()
        for batch in batches
    }


@pytest.mark.parametrize("name", long_except(ALWAYS, PATHS))
def test_adaptive_on_a_recording(name):
    """From the first request on, and if the first 40 drafts take three times as long."""
    recording = load(PATHS[name])
    whole, early = shares(recording, adaptive)
    assert whole >= WHOLE
    assert early >= EARLY
    cold, _ = shares(recording, adaptive, COLD)
    assert cold >= SLOW


def test_the_page_gives_these_bounds():
    page = (Path(__file__).parents[2] / "docs" / "mtp.md").read_text()
    given = (
        f"at least {WHOLE} of the best fixed length in hindsight, {EARLY} in the first 100 steps,"
    )
    assert f"{given} {SLOW} if the first {COLD} drafts take three times as long." in page


@pytest.mark.parametrize("name", ["sglang-block-4", "vllm-tiny-4"])
def test_mixed_traffic_gains_from_own_lengths(name):
    """Of one request every draft is right, of the next none."""
    recording = load(PATHS[name])
    mixed = replace(recording, runs=[right * 120 for right in (str(recording.num_drafts), "0") * 3])
    assert shares(mixed, adaptive)[0] >= 1.01


def test_the_recorder_writes_what_is_kept(tmp_path, monkeypatch):
    events = tmp_path / "events"
    events.touch()
    monkeypatch.setenv(record.EVENTS, str(events))
    monkeypatch.setenv(record.STEPS, "50")
    recorder = record.Recorder(K)
    lengths = [0, 0]
    for _ in range(80):
        for request, drafted in zip("ab", lengths, strict=True):
            recorder.observe_verify(request, drafted, drafted // 2)
        recorder.observe_step(2, 2 + sum(lengths), 0.01)
        if any(lengths):
            recorder.observe_draft(2, max(lengths), 0.002)
        lengths = recorder.lengths(["a", "b"], [0, 0])
        assert all(0 <= length <= K for length in lengths)
    kept = record.kept(events, batch=2, num_drafts=K, steps=50)
    assert {tokens for _, tokens, _ in kept["steps"]} >= {2, 2 + 2 * K}
    assert {passes for _, passes, _, _ in kept["drafts"]} == {1, 2, K}
    assert set("".join(kept["runs"])) == {str(K // 2)}
    assert len(kept["runs"]) == 2
