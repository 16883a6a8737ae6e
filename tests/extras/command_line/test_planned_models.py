"""Every released size is planned for both engines as it was published."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks.sizes import CONFIGS, RELEASED, ROOM
from plans import flags
from qwen3next_plugin.cli import app
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.extras.command_line.plan_tables import bound
from qwen3next_plugin.model.checkpoint.headers import INDEX
from qwen3next_plugin.model.checkpoint.layouts import in_projections
from qwen3next_plugin.model.checkpoint.sizes import parameters
from tiers import long_except

STREAMS = "Qwen3.8-Flash-Next"  # its release has a table of n-grams
# What a wrapped checkpoint of Qwen3.5 has: a flat layout, fused experts, a tower.
TEXT = {
    "dtype": "float32",
    "head_dim": 32,
    "hidden_size": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 4096,
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 32,
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "shared_expert_intermediate_size": 32,
    "vocab_size": 128,
}
WRAPPED = {"model_type": "qwen3_5_moe", "text_config": TEXT}
FLAT_NAMES = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


def plan(folder, *options):
    command = ["plan", str(folder), *map(str, options), "--json"]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, command)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def write(folder, config=WRAPPED):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(config):
    """The tensors of a wrapped checkpoint, its experts fused, with a vision tower's."""
    tensors = {"model.visual.patch_embed.proj.weight": torch.empty(1000, 1000)}
    E, D, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
    for name, n in parameters(config).items():
        if ".experts." not in name:
            tensors[name.replace("model.", "model.language_model.", 1)] = torch.empty(n)
    for layer in ("model.language_model.layers.0", "model.language_model.layers.1", "mtp.layers.0"):
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.empty(E, 2 * I, D)
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.empty(E, D, I)
    return tensors


# One of each layout, and of the smaller ones, whose plans take least.
SMALL = ("Qwen3-Next-80B-A3B", "Qwen3.5-0.8B", "Qwen3.6-27B", "Qwen3.6-35B-A3B")
ALWAYS = [*product(SMALL, ("vllm",)), ("Qwen3.8-Flash-Next", "sglang")]


@pytest.mark.parametrize("case", long_except(ALWAYS, product(RELEASED, ("vllm", "sglang"))))
def test_each_config_is_planned(case):
    name, engine = case
    asked = ("--num-speculative-tokens", 3, "--max-model-len", 32768, "--max-num-seqs", 4096)
    weights = sum(plan(CONFIGS / name, *asked, "--memory", 1)["weights"].values())
    gib = (weights + ROOM) / 2**30
    found = plan(CONFIGS / name, *asked, "--memory", gib, "--engine", engine)
    assert found["weights_from"] == "config.json"
    assert found["concurrency"] == found["fits"] > 0
    files = found["ngram_table_in_files"]
    assert 2 * (found["parameters"] + found["parameters_mtp"]) < weights + files


def test_the_table_of_n_grams_is_counted_apart(monkeypatch):
    """16 heads of about 20 million rows of 160 in bf16: in files, or among the weights."""
    mapped = plan(CONFIGS / STREAMS, "--memory", 1)
    table = mapped["ngram_table_in_files"]
    assert table == pytest.approx(2 * 16 * 20e6 * 160, rel=1e-3)
    monkeypatch.setenv("QWEN3NEXT_NGRAM", "resident")
    resident = plan(CONFIGS / STREAMS, "--memory", 1)
    assert resident["ngram_table_in_files"] == 0
    both = (sum(each["weights"].values()) for each in (resident, mapped))
    assert table == int.__sub__(*both)


def test_a_wrapped_checkpoint_without_its_tower(tmp_path):
    folder = write(tmp_path / "model")
    config = Qwen3NextConfig.from_hf(WRAPPED)
    assert set(in_projections(config)) == {f"linear_attn.{name}.weight" for name in FLAT_NAMES}
    by_config = plan(folder, "--num-speculative-tokens", 2, "--memory", 1)
    save_file(stored(config), folder / "model.safetensors")
    by_files = plan(folder, "--num-speculative-tokens", 2, "--memory", 1)
    assert by_files["weights_from"] == "safetensors files"
    assert by_files["weights"] == by_config["weights"]
    assert by_files["flags"]["dtype"] == "float32"  # text_config's
    assert by_files["parameters"] * 4 < sum(by_files["weights"].values())


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp."])
def test_an_index_says_whether_the_mtp_layer_was_kept(tmp_path, prefix):
    folder = write(tmp_path / "model")
    names = ["model.language_model.norm.weight", f"{prefix}norm.weight"]
    for kept in (names, names[:1]):
        index = {"metadata": {"total_size": 2**40}, "weight_map": dict.fromkeys(kept, "a")}
        (folder / INDEX).write_text(json.dumps(index))
        command = ["plan", str(folder), "--memory", "1", "--num-speculative-tokens", "1"]
        done = CliRunner().invoke(app, command)
        assert (done.exit_code == 0) == (len(kept) == 2)
    assert "the checkpoint has no mtp.* tensors" in done.stderr


@pytest.mark.parametrize("level", ["text_config", "top"])
def test_drafts_of_a_config_without_mtp(tmp_path, level):
    none = {"mtp_num_hidden_layers": 0}
    text = {name: value for name, value in TEXT.items() if name != "mtp_num_hidden_layers"}
    nested = text | none if level == "text_config" else text
    folder = write(tmp_path / "model", {**WRAPPED, "text_config": nested} | none)
    assert plan(folder, "--memory", 1)["parameters_mtp"] == 0
    command = ["plan", str(folder), "--memory", "1", "--num-speculative-tokens", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "mtp_num_hidden_layers = 0: there is nothing to draft with" in done.stderr
    assert "drop --num-speculative-tokens" in done.stderr


@pytest.mark.parametrize(
    ("memory", "said"), [(2**20, "memory: no request"), (2**30, "--max-model-len: one request")]
)
def test_what_bounds_the_pools(memory, said):
    config = Qwen3NextConfig.from_hf(read_config(CONFIGS / "Qwen3.5-0.8B"))
    p = make_plan(Pools, config, {}, flags(memory=memory, max_model_len=262144))
    assert bound(p).startswith(said)
    if p.tokens:
        fitting = make_plan(Pools, config, {}, flags(memory=memory, max_model_len=p.tokens))
        assert fitting.concurrency == 1
