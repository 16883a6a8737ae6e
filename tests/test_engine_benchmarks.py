"""Benchmarks that start engines: what they make of the workers' answers, and when they are red."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.engines import quantised, startup, steps
from benchmarks.mtp import steps as verify
from benchmarks.mtp.floors import BLOCK
from benchmarks.peers import decode
from benchmarks.report import RedCheckError, Run

# Milliseconds of a decode step of one request, by engine; of more, as many times as long.
MS = {"upstream": 3.0, "plugin": 2.0, "SGLang": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


class Worker:
    """Answers as an engine's process does: some steps are slower than the shortest."""

    off = 0.0  # of the log-probabilities of SGLang, int4 and upstream's drafts

    def __init__(self, name: str, flags: dict, log: Path, **options: object) -> None:
        self.name = name
        side, _, drafts = name.partition(", draft of ")
        self.ms = MS.get(side, 5.0) * (1 + int(drafts or 0))
        self.differs = side in ("SGLang", "int4", "llama.cpp") or name == "upstream, draft of 3"

    def logprobs(self) -> list[float]:
        return [-1.0 - self.off * self.differs, -2.0]

    def call(self, name: str, **arguments: int):
        if name == "peak_memory":
            return 10 * self.ms
        if name == "prefill":
            return self.ms * arguments["tokens"]
        return [9e3, self.ms * arguments["batch"], 8e3]


@pytest.fixture(autouse=True)
def engines(monkeypatch, tmp_path):
    for module in (steps, quantised, verify, decode):
        monkeypatch.setattr(module, "Worker", Worker)
        monkeypatch.setattr(module, "started", nullcontext)
        monkeypatch.setattr(module, "block_model", lambda folder: folder)
    monkeypatch.setattr(steps, "SGLANG_PYTHON", tmp_path)
    peers = {"llama.cpp": decode.Peer(tmp_path / "installed", decode.WEIGHTS)}
    monkeypatch.setattr(decode, "THEIRS", peers)
    monkeypatch.setattr(decode, "gguf_model", lambda model, path, kind: path)


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "installed").write_text("1.0\n")
    return Run(tmp_path, "engines", {})


def test_both_engines_and_upstream(run):
    found, memory, hosts = steps.measure(run)
    assert found.rows["decode, batch 8"] == {
        "upstream": 24,
        "plugin": 16,
        "upstream / plugin": 1.5,
    }
    assert found.rows["prompt of 8,192 tokens"]["plugin"] == 2 * 8192
    assert memory.rows["resident memory"]["plugin / upstream"] == pytest.approx(2 / 3)
    assert hosts.rows["decode, batch 1"] == {"vLLM": 2, "SGLang": 4, "SGLang / vLLM": 2}


def test_without_sglang(run, monkeypatch):
    monkeypatch.setattr(steps, "SGLANG_PYTHON", Path("missing"))
    assert [record.name for record in steps.measure(run)] == ["engines/steps", "engines/memory"]


def test_quantised_weights(run):
    found, memory = quantised.measure(run)
    assert found.rows["decode, batch 8"] == {"bf16": 16, "int8": 8, "int4": 4}
    assert memory.rows["resident memory"] == {"bf16": 20, "int8": 10, "int4": 5}


def test_verify_steps_in_plain_steps(run):
    found, memory = verify.measure(run)
    assert found.rows["draft of 3, batch 8"] == {
        "bytes, at least": BLOCK.over_plain(3, 8),
        "bytes, expected": BLOCK.expected(3, 8),
        "upstream step": 96,
        "upstream": 4,
        "plugin step": 64,
        "plugin": 4,
    }
    assert set(found.units) == set(found.rows["draft of 1, batch 1"])
    assert memory.rows["resident memory, draft of 3"]["plugin / upstream"] == pytest.approx(2 / 3)


def test_other_engines(run):
    (found,) = decode.measure(run)
    assert "llama.cpp 1.0" in found.case
    assert found.rows["int4, decode, batch 8"] == {
        "plugin": 16,
        "llama.cpp": 40,
        "llama.cpp / plugin": 2.5,
    }
    assert not decode.missing()
    (run.out / "installed").unlink()
    assert decode.missing() == f"needs `make {run.out / 'installed'}`"


@pytest.mark.parametrize("measure", [steps, quantised, verify, decode], ids=lambda m: m.__name__)
def test_other_results_are_red(run, monkeypatch, measure):
    monkeypatch.setattr(Worker, "off", 3.0)
    with pytest.raises(RedCheckError):
        list(measure.measure(run))


def test_the_shortest_start(run, monkeypatch):
    times = iter([(9.0, 0.5), (6.0, 0.4), (8.0, 0.7), (7.0, 0.3)])
    monkeypatch.setattr(startup, "start", lambda run, side: next(times))
    (found,) = startup.measure(run)
    assert found.rows["until ready"] == {
        "upstream": 8,
        "plugin": 6,
        "plugin / upstream": 0.75,
    }
    assert found.rows["first request minus second"] == {"upstream": 0.5, "plugin": 0.3}
