"""The family's benchmark: its models have the released layers, and each engine is timed in turn."""

import pytest
from safetensors.torch import load_file

from benchmarks import block_model
from benchmarks.engines import family
from benchmarks.report import RedCheckError, Run
from qwen3next_plugin.config import read_config

SMALL = {
    "vocab_size": 1280,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@pytest.fixture
def small(monkeypatch):
    """Released configs with small layers."""

    def read(folder):
        raw = read_config(folder)
        if text := raw.get("text_config"):
            text |= {name: size for name, size in SMALL.items() if name in text}
        return raw

    monkeypatch.setattr(block_model, "read_config", read)


@pytest.mark.parametrize("size", family.SIZES)
def test_models_are_written_once_and_are_complete(small, tmp_path, size):
    folder = block_model.four_layers(tmp_path / size, size)
    config = read_config(folder)
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    files = sorted(folder.glob("*.safetensors"))
    tensors = [item for file in files for item in load_file(file).items()]
    assert {name: tuple(t.shape) for name, t in tensors} == block_model.tensors(config)
    names = [name for name, _ in tensors]
    assert len(names) == len(set(names))
    first, second = (dict(tensors)[f"model.layers.{i}.linear_attn.out_proj.weight"] for i in (0, 1))
    assert not first.equal(second)
    before = files[0].stat().st_mtime_ns
    block_model.four_layers(folder, size)
    assert files[0].stat().st_mtime_ns == before


class Engine:
    """Answers as a worker does; upstream is the fastest, drafting the slowest."""

    SLOWER = ("upstream", "plugin", "drafting")

    def __init__(self, name: str, off: float) -> None:
        self.slower, self.off = 1 + self.SLOWER.index(name), off

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def logprobs(self) -> list[float]:
        return [-1.0 + self.off, -2.0]

    def call(self, name: str, **arguments: int):
        return [9.0, self.slower * arguments["batch"]] if name == "decode" else 1e3 * self.slower


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_shortest_times_of_equal_engines(monkeypatch, tmp_path, off):
    monkeypatch.setattr(family, "SIZES", ("a",))
    monkeypatch.setattr(family, "four_layers", lambda folder, size: folder)
    monkeypatch.setattr(
        family, "start", lambda run, model, name: Engine(name, off if name == "plugin" else 0.0)
    )
    run = Run(tmp_path, "family", {})
    if off:
        with pytest.raises(RedCheckError, match="differ by"):
            list(family.measure(run))
        return
    steps, verify = family.measure(run)
    assert steps.rows["a: decode, batch 1"] == {
        "upstream": 1,
        "plugin": 2,
        "upstream / plugin": 0.5,
    }
    assert steps.rows["a: prompt of 1,024 tokens"]["plugin"] == 2e3
    assert verify.rows["a: decode, batch 1"]["in plain steps"] == 1.5
