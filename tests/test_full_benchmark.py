"""The benchmark of a whole released size: engines load its models, and its limits are counted."""

import json
import re

import pytest
from safetensors.torch import load_file

from benchmarks import full, full_model
from benchmarks.chain_model import answer_of
from benchmarks.report import RedCheckError
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.files import formats_of

SIZE = "Qwen3.6-35B-A3B"
SMALL = {
    "vocab_size": 1280,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}


@pytest.fixture
def small(monkeypatch):
    """A released config with small layers."""

    def read(folder):
        raw = read_config(folder)
        raw["text_config"] |= SMALL
        return raw

    monkeypatch.setattr(full_model, "read_config", read)


@pytest.mark.parametrize("kind", full_model.KINDS)
def test_models_are_what_engines_load(small, tmp_path, kind):
    folder = full_model.full_model(tmp_path / kind, SIZE, kind, 4)
    raw = json.loads((folder / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    assert config.num_hidden_layers == 4
    stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
    formats = None
    if kind != "bf16":
        formats = formats_of(folder, config, raw["quantization_config"], asked=None)
        assert not formats.dequantised
    expected = all_tensors(config)
    found = dict(parameters(stored.items(), config, expected=expected, formats=formats))
    quantised = [name for name in found if name.endswith("weight_scale")]
    assert bool(quantised) == (kind != "bf16")
    assert not any(name.startswith(("mtp.", "lm_head", "model.embed")) for name in quantised)
    left_out = re.compile(r"mtp\.|model\.embed|.*channel_scale$")  # the last: as large as a bias
    sizes = {name: t.nbytes for name, t in found.items() if not left_out.match(name)}
    counted = full.step_bytes(raw, kind, 10**6)
    head = found["lm_head.weight"]
    if kind != "bf16":
        sizes["lm_head.weight"] = head.numel()
    assert counted == pytest.approx(sum(sizes.values()), rel=0.01)
    before = (folder / "config.json").stat().st_mtime_ns
    full_model.full_model(folder, SIZE, kind, 4)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_model_is_packed_once(small, tmp_path):
    folder = full_model.full_model(tmp_path / "int4", SIZE, "int4", 4)
    packed = full.pack(folder)
    written = (packed / "config.json").stat().st_mtime_ns
    assert read_config(packed)["quantization_config"]["quant_method"] == "qwen3next"
    assert full.pack(folder) == packed
    assert (packed / "config.json").stat().st_mtime_ns == written


def test_a_step_reads_the_experts_that_its_tokens_choose(small):
    config = full_model.full_config(SIZE, "int4", 4)
    one, two = (full.step_bytes(config, "int4", n) for n in (1, 2))
    experts = 4 * 4 * 3 * 256 * 128 * full.BITS["int4"] / 8
    assert two - one == pytest.approx(experts / 4)  # of 4 experts, 2 and then 3
    dense = full.products(config | {"num_experts_per_tok": 4})
    assert dense - full.products(config) == pytest.approx(4 * 2 * 3 * 256 * 128)


class Engine:
    """Answers as a worker does, one of a few times wrongly."""

    name, calls = "plain", 0

    def __init__(self, config):
        self.config = config

    def call(self, name, prompts, tokens):
        self.calls += 1
        answers = [[int(w) for w in answer_of(self.config, p, tokens)] for p in prompts]
        if self.calls == full.ROUNDS:
            answers[0][-1] += 1
        return 5.0, answers


def test_no_figure_of_wrong_answers(small):
    engine = Engine(full_model.full_config(SIZE, "int4", 4))
    with pytest.raises(RedCheckError, match="an answer of 2 requests is wrong"):
        full.rate(engine, engine.config, 2)
    assert full.rate(engine, engine.config, 2) == 5.0
    answers = {"plain": {1: 2.0, 4: 4.0}, "drafts": {1: 3.0, 4: 4.0}}
    assert [row["drafts / plain"] for row in full.ratios(answers).values()] == [1.5, 1.0]
