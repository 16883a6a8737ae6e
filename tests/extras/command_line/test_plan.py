"""`qwen3next plan` against published numbers, and what it complains of."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.sizes import CONFIGS as RELEASED_CONFIGS
from checkpoints import BASE, write_checkpoint
from command_line import run
from plans import CONFIG, COUNTS, SIZES, flags
from quantised import MIXED, write_quantised
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.plan import GIB, StateDtype, make_plan
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.extras.command_line.machine import machine
from qwen3next_plugin.extras.command_line.plan_tables import bound
from qwen3next_plugin.model.checkpoint import headers
from qwen3next_plugin.model.checkpoint.headers import INDEX
from qwen3next_plugin.model.checkpoint.reading import parameters as parameters_of
from qwen3next_plugin.model.checkpoint.sizes import part_of, without_mtp
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.state import STATE_DTYPES
from qwen3next_plugin.mtp.draft_head import DRAFTED
from tiers import long_except

NEXT_80B = "Qwen3-Next-80B-A3B"


@settings(deadline=None)
@given(memory=st.integers(0, 2000), length=st.integers(1, 262144))
def test_any_plan_has_a_bound(memory, length):
    weights = {"model.embed_tokens.weight": 150 * GIB}
    asked = flags(memory=memory * GIB, max_model_len=length)
    assert bound(make_plan(Blocks, CONFIG, weights, asked)).split(":")[0] in (
        "the weights",
        "memory",
        "--max-model-len",
        "--max-num-seqs",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": 100 * GIB}, r"the weights: 148\.\d+ GiB do not fit in 100\.00 GiB"),
        ({"memory": 149 * GIB}, r"--max-model-len: .* lower it to \d+ tokens"),
        ({"memory": int(148.45 * GIB)}, "memory: no request of any length fits next to"),
        ({"max_num_seqs": 32}, r"--max-num-seqs: the memory would hold \d+ requests"),
        ({"max_num_seqs": 4096}, r"memory: \d+ of the 4096 requests"),
    ],
)
def test_what_bounds(changes, said):
    assert re.match(said, bound(make_plan(Blocks, CONFIG, SIZES, flags(**changes))))


@pytest.mark.parametrize("memory", ["inf", "nan", "-1", "1e400"])
def test_memory_that_no_machine_has_is_refused(memory):
    result = run("plan", RELEASED_CONFIGS / "Qwen3.6-27B", "--memory", memory)
    assert result.exit_code == 2
    assert "--memory" in result.output


def test_length_to_lower_to_fits():
    def plan(length):
        changes = {"memory": 149 * GIB, "max_model_len": length}
        return make_plan(Blocks, CONFIG, SIZES, flags(**changes))

    advised = int(re.search(r"lower it to (\d+) tokens", bound(plan(262144)))[1])
    assert plan(advised).concurrency == 1
    assert plan(advised + 1).concurrency == 0


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
    for command in ("plan", "warmup"):
        result = run(command, tmp_path)
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


def test_plan_of_a_hub_name():
    result = run("plan", "Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert result.exit_code == 1
    assert "not a folder" in result.stderr


@pytest.mark.parametrize("command", [(), ("plan",), ("doctor",)])
def test_help_teaches_by_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "qwen3next " in result.output


@pytest.mark.parametrize("command", ["plan", "warmup"])
def test_a_state_dtype_that_no_engine_serves_is_refused(released, command):
    assert get_args(StateDtype) == STATE_DTYPES
    done = run(command, released, "--state-dtype", "float16")
    assert done.exit_code == 2
    for part in ("--state-dtype", "float16", "float32", "bfloat16"):
        assert part in done.output
