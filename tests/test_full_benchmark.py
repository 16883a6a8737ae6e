"""The benchmark of a whole released size: engines load its models, and its limits are counted."""

import json
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.chain_model import answer_of
from benchmarks.full import limits, measure, model
from benchmarks.peers import gguf_model
from benchmarks.report import RedCheckError, Run
from needs import needs
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import all_tensors, trunk_tensors
from qwen3next_plugin.model.quantisation.files import formats_of
from released import read_with

SIZE, ROUNDS = "Qwen3.6-35B-A3B", 3
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
    monkeypatch.setattr(model, "read_config", read_with(SMALL))


@pytest.mark.parametrize("kind", model.KINDS)
def test_models_are_what_engines_load(small, tmp_path, kind):
    folder = model.full_model(tmp_path / kind, SIZE, kind, 4)
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
    requests = 10**6
    counted = limits.step_bytes(raw, kind, requests) - requests * limits.state_bytes(raw)
    head = found["lm_head.weight"]
    if kind != "bf16":
        sizes["lm_head.weight"] = head.numel()
    assert counted == pytest.approx(sum(sizes.values()), rel=0.01)
    before = (folder / "config.json").stat().st_mtime_ns
    model.full_model(folder, SIZE, kind, 4)
    assert (folder / "config.json").stat().st_mtime_ns == before


@needs("pack")
def test_a_model_is_packed_once(small, tmp_path):
    folder = model.full_model(tmp_path / "int4", SIZE, "int4", 4)
    packed = measure.pack(folder)
    written = (packed / "config.json").stat().st_mtime_ns
    assert read_config(packed)["quantization_config"]["quant_method"] == "qwen3next"
    assert measure.pack(folder) == packed
    assert (packed / "config.json").stat().st_mtime_ns == written


def test_a_step_reads_the_experts_that_its_tokens_choose(small):
    config = model.full_config(SIZE, "int4", 4)
    one, two = (limits.step_bytes(config, "int4", n) for n in (1, 2))
    experts = 4 * 4 * 3 * 256 * 128 * limits.BITS["int4"] / 8
    states = limits.state_bytes(config)
    assert two - one == pytest.approx(experts / 4 + states)  # of 4 experts, 2 and then 3
    dense = limits.products(config | {"num_experts_per_tok": 4})
    assert dense - limits.products(config) == pytest.approx(4 * 2 * 3 * 256 * 128)


def test_what_layers_read_and_multiply_beside_their_weights(small):
    config = model.full_config(SIZE, "int4", 4)  # three linear layers and a full one
    assert limits.state_bytes(config) == 3 * 4 * 64 * 64 * 4 * 9 / 8  # written once in 8 steps
    mean = sum(range(1, 8)) / 7  # positions that a token of seven attends to
    assert limits.attention_products(config, 7) == 2 * 2 * 256 * mean  # keys, then values


class Engine:
    """Answers as a worker does, one of a few times wrongly."""

    name, calls = "plain", 0

    def __init__(self, config):
        self.config = config

    def call(self, name, prompts, tokens):
        self.calls += 1
        answers = [[int(w) for w in answer_of(self.config, p, tokens)] for p in prompts]
        if self.calls == ROUNDS:
            answers[0][-1] += 1
        return 5.0, answers


def test_no_figure_of_wrong_answers(small):
    engine = Engine(model.full_config(SIZE, "int4", 4))
    with pytest.raises(RedCheckError, match="an answer of 2 requests is wrong"):
        measure.rate(engine, engine.config, 2, ROUNDS)
    assert measure.rate(engine, engine.config, 2, ROUNDS) == 5.0


def test_least_work_of_a_step_and_of_a_prompt(small):
    config = model.full_config(SIZE, "int4", 4)
    many = limits.step_work(config, "int4", 10)
    assert many.nbytes == limits.step_bytes(config, "int4", 10)
    assert many.products == 10 * (limits.products(config) + 1280 * 256)  # the head
    per_token = limits.products(config) + limits.attention_products(config, 7)
    assert limits.prompt_work(config, 7) == (0, 7 * per_token)


def test_each_round_has_the_limit_of_its_time(monkeypatch):
    """What takes longer, at the mean of the rates before and after."""
    rates = iter([limits.Rates(5e9, 1e10), limits.Rates(3e9, 2e10), limits.Rates(1e9, 4e10)])
    monkeypatch.setattr(limits, "measured_rates", lambda: next(rates))
    times = iter((2000.0, 1200.0))
    found = limits.rounds_of(limits.Work(4e9, 1.5e10), lambda: next(times), 2)
    assert found == [(2000.0, 1000.0), (1200.0, 2000.0)]
    assert limits.mean(found) == (1600.0, 1500.0)


def test_a_rate_is_the_mean_of_a_window(monkeypatch):
    """A call that takes long now and then counts; the other one does not."""
    monkeypatch.setattr(limits, "WINDOW", 0.2)
    pauses = cycle((0.0, 0.02))
    often, never = limits.mean_seconds(lambda: time.sleep(next(pauses)), lambda: None)
    assert often >= 0.009 > never


def test_other_engines_stand_beside_the_plugin(tmp_path, monkeypatch):
    (tmp_path / "installed").write_text("1.0\n")
    peer = replace(measure.THEIRS["llama.cpp"], installed=tmp_path / "installed")
    monkeypatch.setitem(measure.THEIRS, "llama.cpp", peer)
    ours = {"decode, batch 1": 3.0, "decode, batch 4": 4.0}
    times = {"plugin": ours, "llama.cpp": {"decode, batch 1": 6.0}}
    record = measure.compared(Run(tmp_path, "full", {}), "case", times)
    assert record.case == "case; llama.cpp 1.0"
    row = {"plugin": 3.0, "llama.cpp": 6.0, "llama.cpp / plugin": 2.0}
    assert record.rows == {"decode, batch 1": row}


def test_a_gguf_file_has_the_same_weights(small, tmp_path):
    """Also those of the flat layout, where b and a stand apart, and of every block of 4 bits."""
    folder = model.full_model(tmp_path / "int4", SIZE, "int4", 4)
    config = Qwen3NextConfig.from_hf(json.loads((folder / "config.json").read_text()))
    read = set()
    with ExitStack() as stack:
        where = gguf_model.files(folder, stack)

        def reading(name):
            read.add(name)
            return gguf_model.read(where, name)

        found = {name: tensor() for name, tensor in gguf_model.named(config, reading)}
        shapes = gguf_model.named(config, partial(gguf_model.described, where))
        assert {name: (t().shape, t().dtype == torch.uint8) for name, t in shapes} == {
            name: (tensor.shape, tensor.dtype == torch.uint8) for name, tensor in found.items()
        }
        name = "model.layers.1.linear_attn.in_proj_z.weight"
        packed, scale = (
            where[f"{name}_{p}"].get_tensor(f"{name}_{p}") for p in ("packed", "scale")
        )
        b, a = (where[n].get_tensor(n) for n in (name.replace("_z", f"_{p}") for p in "ba"))
    assert read == set(trunk_tensors(config))
    N, K = packed.shape[0], 8 * packed.shape[1]
    columns = [(packed[:, k // 8] >> 4 * (k % 8) & 15) - 8 for k in range(K)]
    wanted = torch.stack(columns, dim=1) * scale.float().repeat_interleave(128, dim=1)
    blocks = found["blk.1.attn_gate.weight"].view(N, K // 32, 18)
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    values = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).float() - 8
    assert torch.equal((d * values).flatten(1), wanted)
    ba = found["blk.1.ssm_ba.weight"]
    assert torch.equal(ba, torch.cat([b[:2], a[:2], b[2:], a[2:]]))
