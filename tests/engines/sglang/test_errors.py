"""What cannot be served is refused before a worker starts, by an error that names the fix."""

import json
import os
import pkgutil
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

import bad_weights
from checkpoints import BASE, write_checkpoint
from engines import damaged, mixed
from family import FAMILY
from quantised import write_quantised
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.plan import GIB
from qwen3next_plugin.engines.sglang import served
from qwen3next_plugin.engines.sglang.config import read_config
from qwen3next_plugin.engines.sglang.cpu import memory
from qwen3next_plugin.engines.sglang.flags import check_flags, complete_drafts
from qwen3next_plugin.engines.sglang.names import ARCHITECTURES
from qwen3next_plugin.model.checkpoint.errors import CheckpointError

NEXTN = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
FP32 = {"dtype": "float32"}  # SGLang's own choice for such a checkpoint is float16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """SGLang hands some flags on in environment variables: no later test's server may see them."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def complete(environment):
    """SGLang completes its flags, as it does before it starts a process; what they then are."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    def run(model, **flags):
        server_args = ServerArgs(model_path=str(model), **flags)
        server_args.resolve_once()
        return resolving_view(server_args)

    return run


# flags ------------------------------------------------------------------------------------------


def test_batch_invariance_in_another_dtype(monkeypatch, checkpoint, complete):
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    with pytest.raises(ConfigError, match=r"BATCH_INVARIANT=1: in torch\.float32, .* --dtype bfl"):
        complete(checkpoint, **FP32)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        NEXTN,
        NEXTN | {"speculative_num_steps": 8},
        NEXTN | {"speculative_algorithm": "eagle", "speculative_eagle_topk": 2},
        {"tp_size": 2},
        {"disable_radix_cache": True},
        {"kv_cache_dtype": "auto", "mamba_ssm_dtype": "bfloat16"},
        {"load_format": "dummy"},
    ],
    ids=str,
)
def test_what_can_be_served_passes(complete, checkpoint, flags):
    resolved = complete(checkpoint, **flags)
    assert resolved.attention_backend == "qwen3next_cpu"
    assert resolved.disable_overlap_schedule


def test_a_port_for_grpc_is_refused_where_a_variable_gives_it(complete, checkpoint, monkeypatch):
    monkeypatch.setenv("SGLANG_GRPC_PORT", "30001")
    with pytest.raises(ConfigError, match=r"^--grpc-port 30001: .*; leave it out"):
        complete(checkpoint)


@pytest.mark.parametrize("name", ["SGLANG_RUST_SERVER", "SGLANG_ENABLE_METRICS_DEVICE_TIMER"])
def test_variables_that_pass_by_the_plugin(complete, checkpoint, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"^{name}: .*; unset it"):
        complete(checkpoint)


@pytest.mark.parametrize("name", ["speculative_eagle_topk", "speculative_num_draft_tokens"])
def test_drafts_without_their_number_of_steps(complete, checkpoint, name):
    with pytest.raises(ConfigError, match=r"--speculative-num-steps is missing: add it"):
        complete(checkpoint, speculative_algorithm="NEXTN", **{name: 4})


def test_qwens_own_line_is_completed(complete, checkpoint):
    resolved = complete(checkpoint, **NEXTN)
    assert (resolved.speculative_eagle_topk, resolved.speculative_num_draft_tokens) == (1, 4)


@pytest.mark.parametrize("apart", [False, True])
def test_a_tokenizer_that_is_larger_than_the_embedding(complete, checkpoint, tmp_path, apart):
    """Beside the model, or in a folder of its own."""
    folder = tmp_path if apart else write_checkpoint(tmp_path)
    flags = {"tokenizer_path": str(tmp_path)} if apart else {}
    file, words = folder / "tokenizer.json", {"a": 0, "b": BASE["vocab_size"]}
    file.write_text(json.dumps({"model": {"vocab": words}}))
    says = f"{file} has {BASE['vocab_size'] + 1} tokens, .* has {BASE['vocab_size']}; "
    with pytest.raises(ConfigError, match=f"^{says}.* --tokenizer-path$"):
        complete(checkpoint if apart else folder, **flags)


# A value of each flag that cannot be served on a CPU.
REFUSED = {
    "model_impl": "transformers",
    "tokenizer_worker_num": 2,
    "grpc_port": 30001,
    "load_format": "sharded_state",
    "moe_runner_backend": "flashinfer_cutlass",
    "moe_dense_tp_size": 1,
    "init_expert_location": "map.json",
    "ep_num_redundant_experts": 2,
    "ep_dispatch_algorithm": "static",
    "expert_distribution_recorder_mode": "stat",
    "expert_balancedness_report_mode": "server_log",
    "mamba_radix_cache_strategy": "extra_buffer",
    "page_size": 16,
    "mamba_ssm_dtype": "float16",
    "radix_cache_backend": "other",
    "strip_thinking_cache": True,
    "cpu_offload_gb": 4,
    "qsa_indexer_dtype": "fp8_e4m3",
    "pp_size": 2,
    "ep_size": 2,
    "moe_a2a_backend": "deepep",
    "attn_dp_size": 2,
    "moe_dp_size": 2,
    "attn_cp_size": 2,
    "dcp_size": 2,
    "quantization": "fp8",
    "lora_backend": "triton",
    "linear_attn_backend": "flashinfer",
    "linear_attn_decode_backend": "flashinfer",
    "linear_attn_prefill_backend": "flashinfer",
    "linear_attn_verify_backend": "flashinfer",
}
REFUSED_ON_GPU = {
    "mamba_radix_cache_strategy": "extra_buffer_lazy",
    "speculative_eagle_topk": 2,
    "lora_paths": ["adapter"],
    "disaggregation_mode": "prefill",
}
REFUSED_WITH_DRAFTS = {
    "speculative_draft_load_format": "presharded",
    "speculative_moe_runner_backend": "flashinfer_cutlass",
    "speculative_draft_model_quantization": "fp8",
    "speculative_draft_kv_cache_dtype": "fp8_e4m3",
    "speculative_draft_attention_backend": "triton",
    "speculative_accept_threshold_single": 0.5,
    "speculative_accept_threshold_acc": 0.5,
    "speculative_token_map": "map.pt",
    "speculative_draft_window_size": 64,
    "decoupled_spec_role": "drafter",
    "grammar_backend": "outlines",
}


class Given:
    """Resolved flags, one of them with another value."""

    def __init__(self, resolved, name, value):
        self.resolved, self.changed = resolved, {name: value}

    def __getattr__(self, name):
        return self.changed.get(name, getattr(self.resolved, name))


ON_CPU, ON_CPU_WITH_DRAFTS = served.SERVED_ON_CPU, served.SERVED_WITH_DRAFTS_ON_CPU
ON_GPU, ON_GPU_WITH_DRAFTS = served.SERVED_ON_GPU, served.SERVED_WITH_DRAFTS_ON_GPU


@pytest.mark.parametrize(
    ("name", "on_cpu"),
    [
        *((name, True) for name in (*served.SERVED, *ON_CPU)),
        *((name, True) for name in (*served.SERVED_WITH_DRAFTS, *ON_CPU_WITH_DRAFTS)),
        *((name, False) for name in (*ON_GPU, *ON_GPU_WITH_DRAFTS)),
    ],
)
def test_every_flag_of_the_tables_is_refused_by_name(complete, checkpoint, name, on_cpu):
    """As the platform hands it on: the host refuses some of these itself, before or after."""
    drafts = name not in {**served.SERVED, **ON_CPU, **ON_GPU}
    value = (REFUSED_WITH_DRAFTS if drafts else REFUSED).get(name, True)
    value = value if on_cpu else REFUSED_ON_GPU.get(name, True)
    resolved = complete(checkpoint, **(NEXTN if drafts else {}))
    with pytest.raises(ConfigError) as raised:
        check_flags(Given(resolved, name, value), on_cpu=on_cpu)
    written = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") + ": "
    assert str(raised.value).startswith(written)
    assert "; " in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"mamba_radix_cache_strategy": "extra_buffer"},
            "--mamba-radix-cache-strategy extra_buffer: .*; use no_buffer",
        ),
        ({"enable_linear_replayssm": True}, "--enable-linear-replayssm: .*; leave it out"),
        ({"page_size": 16}, "--page-size 16: .*; leave it out"),
        ({"enable_unified_memory": True}, "--enable-unified-memory: "),
        ({"enable_torch_compile": True}, "--enable-torch-compile: .*; leave it out"),
        (NEXTN | {"enable_mixed_chunk": True}, "--enable-mixed-chunk: .*; leave it out"),
        ({"pp_size": 2}, "--pp-size 2: .*; use --tp-size"),
        ({"tp_size": 2, "ep_size": 2}, "--ep-size 2: .*; use --tp-size"),
        ({"tp_size": 3}, "tp_size = 3: does not divide linear_num_key_heads = 2"),
        ({"quantization": "fp8"}, "--quantization fp8: .*; serve the released checkpoint as it is"),
        (
            FP32 | {"kv_cache_dtype": "fp8_e4m3"},
            "--kv-cache-dtype fp8_e4m3: .*float32; leave",
        ),
        (
            FP32 | {"kv_cache_dtype": "bf16"},
            "--kv-cache-dtype bf16: .*float32; leave it",
        ),
        ({"attention_backend": "triton"}, "--attention-backend triton: it does not run on a CPU"),
        (
            NEXTN | {"attention_backend": "torch_native"},
            "--attention-backend torch_native: .*draft",
        ),
        (NEXTN | {"speculative_num_steps": 9}, "--speculative-num-steps = 9: ask for 1 to 8"),
        (NEXTN | {"speculative_num_steps": 0}, "--speculative-num-steps = 0: ask for 1 to 8, or"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm NGRAM: .*; use NEXTN, or"),
        (NEXTN | {"speculative_algorithm": "EAGLE3"}, "--speculative-algorithm EAGLE3: "),
        (NEXTN | {"speculative_draft_model_path": "other"}, "--speculative-draft-model-path other"),
        (NEXTN | {"speculative_use_rejection_sampling": True}, "--speculative-use-rejection-samp"),
        (NEXTN | {"speculative_adaptive": True}, "--speculative-adaptive: .*QWEN3NEXT_DRAFTS"),
        ({"json_model_override_args": json.dumps({"linear_conv_kernel_dim": 3})}, "dim = 3"),
        ({"json_model_override_args": json.dumps({"linear_value_head_dim": 20})}, "dim = 20: no"),
    ],
    ids=str,
)
def test_flags_are_refused_by_name(complete, checkpoint, flags, message):
    with pytest.raises(ConfigError, match=message):
        complete(checkpoint, **flags)


# defaults ---------------------------------------------------------------------------------------

OTHERS = {
    "attention_backend": "torch_native",
    "mamba_radix_cache_strategy": "no_buffer",
    "disable_overlap_schedule": True,
    "max_running_requests": 7,
}


def the_line(caplog) -> str:
    lines = [m for m in caplog.messages if m.startswith("qwen3next_plugin") and "serves" in m]
    assert len(lines) == 1
    return lines[0]


def test_one_line_says_what_serves_and_what_was_chosen(complete, checkpoint, caplog):
    caplog.set_level("INFO")
    complete(checkpoint)
    line = the_line(caplog)
    assert re.match(
        r"qwen3next_plugin \S+ serves this model on SGLang 0\.5\.\d+, with \S.* kernels "
        r"\(sgl_kernel: .*\); defaults for a machine without a GPU, where no flag was given: "
        r"--attention-backend qwen3next_cpu, --mamba-radix-cache-strategy no_buffer, "
        r"--disable-overlap-schedule, --sleep-on-idle, --watchdog-timeout 3600, "
        r"--max-running-requests 48, "
        r"for states and KV 1/4 of ",
        line,
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_flag_that_was_given_stays(complete, checkpoint, caplog, name):
    caplog.set_level("INFO")
    assert getattr(complete(checkpoint, **{name: OTHERS[name]}), name) == OTHERS[name]
    chosen = the_line(caplog).partition("where no flag was given: ")[2]
    assert f"--{name.replace('_', '-')}" not in chosen
    assert chosen.count("--") >= len(OTHERS) - 1


@pytest.mark.parametrize("name", memory.GIVEN)
def test_the_line_is_silent_on_memory_that_a_flag_decides(complete, checkpoint, caplog, name):
    caplog.set_level("INFO")
    complete(checkpoint, **{name: 0.5 if name == "mem_fraction_static" else 4096})
    assert "for states and KV" not in the_line(caplog)


@pytest.fixture
def pools(monkeypatch):
    """What our sizing of the pools returns, where SGLang's function is `host`."""
    from types import SimpleNamespace as Bag

    from sglang.srt import runtime_context as context

    def size(
        host, total, *, free, request=1.0, mapped=0.0, fixed=False, topk=None, page=0, **flags
    ):
        given = dict.fromkeys(memory.GIVEN) | flags
        planned = Bag(flags=Bag(mapped=int(mapped * GIB)), request_bytes=int(request * GIB))
        spec = Bag(speculative_eagle_topk=topk, speculative_num_draft_tokens=6)
        monkeypatch.setattr(memory, "free_gib", lambda configurator: free)
        monkeypatch.setattr(memory, "plan", lambda *_: planned)
        monkeypatch.setattr(context, "get_server_args", lambda: Bag(**given))
        monkeypatch.setattr(context, "get_memory", lambda: Bag(disable_radix_cache=fixed))
        monkeypatch.setattr(context, "get_schedule", lambda: Bag(max_running_requests=48))
        monkeypatch.setattr(context, "get_spec", lambda: spec)
        configurator = Bag(
            model_config=Bag(hf_config=Bag(architectures=["Qwen3NextForCausalLM"])),
            mambaish_config=Bag(mamba2_cache_params=Bag(mamba_cache_per_req=page)),
        )
        return memory.modest_pools(host, configurator, total)

    return size


@pytest.mark.parametrize(
    ("free", "request_gib", "flags", "asked", "left"),
    [
        (41.0, 1.0, {}, 10.0, 9.0),
        (41.0, 15.0, {}, 15.0, 14.0),  # a request of the context's length
        (4.0, 15.0, {}, 3.0, 2.0),  # all but what steps need, whatever --mem-fraction-static is
        (2.0, 0.5, {}, 0.5, -0.5),
        (41.0, 1.0, {"mem_fraction_static": 0.5}, -4.0, -5.0),
        (41.0, 1.0, {"max_total_tokens": 4096}, -4.0, -5.0),
        (41.0, 1.0, {"fixed": True}, 40.0, 10.0),  # one page a request: KV is held to a part
        (3.5, 1.0, {"fixed": True}, 2.5, 1.0),
    ],
    ids=str,
)
def test_pools_take_a_part_of_the_free_memory(pools, free, request_gib, flags, asked, left):
    seen = []

    def host(_, total):
        seen.append(total)
        return total - 1.0

    assert pools(host, -4.0, free=free, request=request_gib, **flags) == left
    assert seen == [asked]


def test_pools_of_other_models_are_sglangs():
    from types import SimpleNamespace as Bag

    other = Bag(model_config=Bag(hf_config=Bag(architectures=None)))
    assert memory.modest_pools(lambda _, total: total - 1.0, other, 40.0) == 39.0


def test_files_in_memory_are_free(grant):
    """In a systemd unit of 1 GiB, full of a checkpoint's files."""
    files = {"memory.max": 1 << 30, "memory.current": 1000 << 20}
    grant("0::/unit\n", {f"unit/{name}": f"{nbytes}\n" for name, nbytes in files.items()})
    grant("0::/unit\n", {"unit/memory.stat": f"active_file 5\ninactive_file {700 << 20}\n"})
    assert memory.free_memory(lambda: 5) == (724 << 20) + 5


def test_pools_leave_room_for_mapped_weights(pools):
    for mapped, budget in ((0.0, 10.0), (16.0, 6.0), (39.5, 1.0)):
        assert pools(lambda _, total: total, 40.0, free=41.0, mapped=mapped) == budget


@pytest.mark.parametrize(
    ("flags", "page", "left"),
    [
        ({}, 2**20, 10.0 - 48 * 4 / 1024),
        ({"max_mamba_cache_size": 9}, 2**20, 40.0 - 48 * 4 / 1024),
        ({}, 2**25, None),  # 6 GiB of 10
        ({"mem_fraction_static": 0.5}, 2**25, 34.0),
    ],
    ids=str,
)
def test_branches_of_draft_trees_are_counted(monkeypatch, pools, flags, page, left):
    """48 requests whose trees have four leaves but one each."""
    from types import SimpleNamespace as Bag

    from qwen3next_plugin.engines.sglang.state import pages

    monkeypatch.setattr(pages, "get_spec", lambda: Bag(speculative_num_draft_tokens=6))
    asked = {"free": 41.0, "topk": 2, "page": page} | flags
    if left is not None:
        assert pools(lambda _, total: total, 40.0, **asked) == left
        return
    message = r"--max-running-requests 48: .* 6\.00 GiB .* of 10\.00 GiB .*; use fewer \(40 fit\)"
    with pytest.raises(ConfigError, match=message):
        pools(lambda _, total: total, 40.0, **asked)


# config and files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_intermediate_size": 0}, "moe_intermediate_size = 0"),
        (
            {"rope_scaling": YARN, "rope_theta": None},
            "rope_parameters has lost rope_theta: .* --json-model-override-args '{",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: .* no tensor"),
    ],
    ids=str,
)
def test_config_that_cannot_be_served(complete, tmp_path, change, message):
    model = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE | change))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        complete(model)


def test_weights_that_memory_cannot_hold(complete, grant_memory, tmp_path):
    """Half of what they take in fp32 is enough for the same in 4 bits."""
    plain = write_checkpoint(tmp_path / "plain")
    quantised, _ = write_quantised(plain, tmp_path, "packed_4-bit")
    grant_memory((plain / "model.safetensors").stat().st_size // 2)
    for flags in (FP32, FP32 | NEXTN, FP32 | {"load_format": "dummy"}, FP32 | {"tp_size": 2}):
        complete(quantised, max_total_tokens=4096, **flags)
        with pytest.raises(ConfigError, match=r"^the weights take \d\.\d\d MiB on this machine"):
            complete(plain, **flags)


def test_a_request_that_nothing_is_left_for(complete, grant_memory, checkpoint):
    """Before weights load, unless a flag says how much memory to use."""
    weights = (checkpoint / "model.safetensors").stat().st_size
    grant_memory((2 << 30) + weights)
    with pytest.raises(ConfigError, match=r"no request of any length .* set --mem-fraction-static"):
        complete(checkpoint, **FP32)
    complete(checkpoint, mem_fraction_static=0.9, **FP32)
    grant_memory((2 << 30) + weights + (64 << 20))
    complete(checkpoint, **FP32)


def test_quantised_checkpoint(complete, tmp_path):
    quantised, _ = write_quantised(write_checkpoint(tmp_path / "plain"), tmp_path, "fp8-blocks")
    complete(quantised)
    damaged = Path(shutil.copytree(quantised, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^mtp\.layers\.0\.self_attn\.o_proj: .*is missing"):
        complete(damaged)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **bad_weights.PLAIN)


@pytest.mark.parametrize("fault", bad_weights.BY_HEADERS)
def test_bad_quantised_weights(complete, plain, tmp_path, fault):
    folder = bad_weights.write_faulty(plain, tmp_path, fault)
    with pytest.raises(CheckpointError, match=bad_weights.FAULTS[fault].message):
        complete(folder)


def test_truncated_file(complete, tmp_path):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes and its header"):
        complete(tmp_path)


NAME = "model.layers.1.linear_attn.conv1d.weight"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", f"1 tensors are missing, the first is {NAME}"),
        ("misshapen", rf"tensor {NAME} has shape \(191, 1, 4\)"),
        ("unexpected", r"unexpected tensor model.layers.1.linear_attn.conv1d.bias \(192,\)"),
        ("mtp", r"1 tensors are missing, the first is mtp.fc.weight"),
    ],
)
def test_checkpoint_fault_ends_the_launch(complete, tmp_path, how, message):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    if how == "missing":
        del tensors[NAME]
    elif how == "misshapen":
        tensors[NAME] = tensors[NAME][:-1].clone()
    elif how == "unexpected":
        tensors[NAME.replace("weight", "bias")] = tensors[NAME][:, 0, 0].clone()
    else:
        del tensors["mtp.fc.weight"]
        save_file(tensors, path)
        complete(tmp_path)  # without drafts nobody asks for it
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        complete(tmp_path, **NEXTN)


def test_drafts_of_a_checkpoint_without_a_drafter(complete, tmp_path):
    model = write_checkpoint(tmp_path, mtp=False)
    complete(model)
    with pytest.raises(CheckpointError, match=r"no mtp\.\* tensors .*--speculative-algorithm"):
        complete(model, **NEXTN)


# two models of the family in one checkpoint -----------------------------------------------------


@pytest.mark.parametrize("case", [*damaged.FILES, *damaged.CONFIGS])
def test_a_damaged_file_is_named(complete, tmp_path, case):
    fault = {**damaged.FILES, **damaged.CONFIGS}[case]
    with pytest.raises((ConfigError, CheckpointError), match=fault.message):
        complete(fault.write(tmp_path))


@pytest.mark.parametrize("case", mixed.CONFIGS)
def test_config_of_two_models(complete, tmp_path, case):
    fault = mixed.CONFIGS[case]
    with pytest.raises(ConfigError, match=fault.message):
        complete(fault.write(tmp_path))


@pytest.mark.parametrize("case", mixed.TENSORS)
def test_tensors_of_another_model(complete, tmp_path, case):
    fault = mixed.TENSORS[case]
    with pytest.raises(CheckpointError, match=fault.message):
        complete(fault.write(tmp_path))


@pytest.mark.parametrize("case", mixed.WITHOUT_MTP)
def test_drafts_of_a_config_without_a_drafter(complete, tmp_path, case):
    model = mixed.without_mtp(tmp_path, *mixed.WITHOUT_MTP[case])
    complete(model)
    with pytest.raises(
        ConfigError, match=r"mtp_num_hidden_layers = 0: .* drop --speculative-algorithm"
    ):
        complete(model, **NEXTN)


# other models -----------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_other_models_keep_the_hosts_choices(complete, llama, caplog):
    """Flags that ours would refuse or fill in are the host's to judge."""
    caplog.set_level("INFO")
    resolved = complete(llama)
    assert resolved.attention_backend in ("intel_amx", "torch_native")
    assert not resolved.disable_overlap_schedule
    assert resolved.max_running_requests is None
    assert resolved.mamba_radix_cache_strategy == "auto"
    assert complete(llama, pp_size=2).pp_size == 2
    assert not [message for message in caplog.messages if message.startswith("qwen3next_plugin")]


def test_drafts_of_other_models_are_not_completed(complete, llama, checkpoint):
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    seen = []
    for model in (llama, checkpoint):
        server_args = ServerArgs(model_path=str(model), **NEXTN)
        complete_drafts(seen.append, server_args)
        given = resolving_view(server_args)
        assert given.speculative_eagle_topk == (1 if model == checkpoint else None)
    assert len(seen) == 2


def test_other_models_keep_the_hosts_class(complete, monkeypatch):
    """SGLang imports all its models to find one; here it has one."""
    from sglang.srt import models
    from sglang.srt.models.registry import ModelRegistry, import_model_classes

    others = (module.name for module in pkgutil.iter_modules(models.__path__))
    monkeypatch.setenv("SGLANG_DISABLED_MODEL_ARCHS", ",".join({*others} - {"llama"}))
    monkeypatch.setattr(ModelRegistry, "models", ModelRegistry.models.copy())
    monkeypatch.setattr(ModelRegistry, "_default_models_loaded", False)
    import_model_classes.cache_clear()
    theirs, _ = ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])
    assert theirs.__module__ == "sglang.srt.models.llama"
    for name in ARCHITECTURES:
        ours, _ = ModelRegistry.resolve_model_cls([name])
        assert ours.__module__.startswith("qwen3next_plugin.")
    import_model_classes.cache_clear()


def test_other_models_keep_their_config(complete):
    """Others, in SGLang, are built on the family's."""
    from sglang.srt.configs.interns2_mobius import InternS2MobiusTextConfig
    from sglang.srt.configs.qwen3_5 import Qwen3_5TextConfig

    assert Qwen3_5TextConfig().partial_rotary_factor == 0.25
    assert InternS2MobiusTextConfig().num_experts == 512


@pytest.mark.parametrize("name", FAMILY)
def test_the_familys_config_is_read_as_it_is_written(complete, tmp_path, name):
    from sglang.srt.utils.hf_transformers_utils import get_config

    folder = FAMILY[name].write(tmp_path)
    written = Qwen3NextConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert read_config(get_config(str(folder), trust_remote_code=False), 1) == written


def test_what_a_gpu_serves_passes(complete, checkpoint):
    resolved = complete(checkpoint, **NEXTN)
    for name, value in (
        *(("mamba_radix_cache_strategy", "extra_buffer"), ("page_size", 64)),
        *(("quantization", "fp8"), ("kv_cache_dtype", "fp8_e4m3")),
        *(("attention_backend", "flashinfer"), ("speculative_use_rejection_sampling", True)),
    ):
        check_flags(Given(resolved, name, value), on_cpu=False)


def graphs(prefill: str = "breakable", decode: str = "full") -> SimpleNamespace:
    """SGLang's cuda_graph_config, as far as it is read."""
    backends = {"prefill": prefill, "decode": decode}
    return SimpleNamespace(**{k: SimpleNamespace(backend=v) for k, v in backends.items()})


@pytest.mark.parametrize("backend", ["breakable", "disabled", "full", "tc_piecewise"])
def test_a_prompts_graph_is_cut_at_our_layers_or_not_made(complete, checkpoint, backend):
    given = Given(complete(checkpoint), "cuda_graph_config", graphs(prefill=backend))
    if backend in ("breakable", "disabled"):
        check_flags(given, on_cpu=False)
        return
    with pytest.raises(ConfigError, match=f"--cuda-graph-backend-prefill {backend}: .*; use br"):
        check_flags(given, on_cpu=False)


@pytest.mark.parametrize("most", [3, 9])
def test_adaptive_steps_have_room_in_a_page(complete, checkpoint, tmp_path, most):
    config = tmp_path / "adaptive.json"
    config.write_text(json.dumps({"1": {"candidate_steps": [0, most]}}))
    flags = {"speculative_adaptive": True, "speculative_adaptive_config": str(config)}
    resolved = complete(checkpoint, **NEXTN)
    given = resolved
    for name, value in (flags | {"cuda_graph_config": graphs()}).items():
        given = Given(given, name, value)
    if most <= 8:
        check_flags(given, on_cpu=False)
        return
    with pytest.raises(ConfigError, match=r"candidate_steps .* = 9: ask for 1 to 8"):
        check_flags(given, on_cpu=False)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_reference_is_in_no_graph(monkeypatch, complete, checkpoint, phase):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    resolved, none = complete(checkpoint), {"prefill": "disabled", "decode": "disabled"}
    check_flags(Given(resolved, "cuda_graph_config", graphs(**none)), on_cpu=False)
    some = none | {phase: "breakable"}
    with pytest.raises(ConfigError, match=r"=reference: .* --cuda-graph-backend-prefill disabled"):
        check_flags(Given(resolved, "cuda_graph_config", graphs(**some)), on_cpu=False)


def test_a_gpu_is_checked_and_one_line_says_what_serves(
    complete, checkpoint, llama, caplog, monkeypatch
):
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.server_args import ServerArgs

    from qwen3next_plugin.engines.sglang import hooks
    from qwen3next_plugin.engines.sglang.cpu import environment

    monkeypatch.setattr(
        "qwen3next_plugin.engines.sglang.flags.architecture", lambda device: asked.append
    )
    monkeypatch.setattr(environment, "on_gpu", lambda: True)
    monkeypatch.delenv("QWEN3NEXT_KERNELS", raising=False)
    caplog.set_level("INFO")
    asked = []
    for model in (llama, checkpoint):
        server_args = ServerArgs(model_path=str(model), device="cuda")
        declare_resolution(server_args, "test", cuda_graph_config=graphs())
        hooks.check_on_gpu(asked.append, server_args)
    assert len(asked) == 2
    ours = [message for message in caplog.messages if message.startswith("qwen3next_plugin")]
    assert len(ours) == 1
    assert re.search(r"serves this model on SGLang 0\.\S+, with Triton kernels", ours[0])
    whole = {"device": "cuda", "mamba_radix_cache_strategy": "no_buffer"}
    server_args = ServerArgs(model_path=str(checkpoint), **whole)
    declare_resolution(server_args, "test", cuda_graph_config=graphs())
    hooks.check_on_gpu(asked.append, server_args)
    assert resolving_view(server_args).disable_overlap_schedule
    server_args = ServerArgs(model_path=str(checkpoint), device="cuda", pp_size=2)
    with pytest.raises(ConfigError, match=r"--pp-size 2: .*; use --tp-size"):
        hooks.check_on_gpu(asked.append, server_args)


def test_another_accelerator_keeps_the_hosts_model_and_one_line_says_so(
    complete, checkpoint, llama, caplog
):
    from sglang.srt.server_args import ServerArgs

    from qwen3next_plugin.engines.sglang.hooks import say_no_kernels

    caplog.set_level("INFO")
    asked = []
    for model in (llama, checkpoint):
        server_args = ServerArgs(model_path=str(model), device="npu")
        say_no_kernels(asked.append, server_args)
    assert len(asked) == 2
    ours = [message for message in caplog.messages if message.startswith("qwen3next_plugin")]
    assert len(ours) == 1
    assert re.search(r"has no kernels for npu yet: SGLang 0\.\S+ keeps its own", ours[0])
