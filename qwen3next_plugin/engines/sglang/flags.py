"""SGLang's flags: every refusal and every default, before a process starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin import env
from qwen3next_plugin.config import (
    ConfigError,
    check_kind,
    check_num_draft_layers,
    check_num_speculative_tokens,
    rope,
)
from qwen3next_plugin.config.tokenizer import check_tokenizer
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.memory import check_weights
from qwen3next_plugin.engines.pacing import TIMEOUT
from qwen3next_plugin.engines.sglang.config import quantization_config, read_config
from qwen3next_plugin.engines.sglang.cpu import memory
from qwen3next_plugin.engines.sglang.cpu.cores import bind_cores
from qwen3next_plugin.engines.sglang.names import (
    ATTENTION_BACKEND,
    DRAFT_ALGORITHMS,
    HOST_BACKEND,
    OVERRIDE_FLAG,
    TORCH_BACKEND,
    is_ours,
    logger,
)
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.engines.sglang.served import LEAVE_OUT, Served, served
from qwen3next_plugin.kernels.gpu.configs import architecture
from qwen3next_plugin.machine.compiler import skip_trials
from qwen3next_plugin.machine.huge_pages import use_huge_pages
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.checkpoint.sizes import served_bytes
from qwen3next_plugin.model.quantisation.at_load import check_at_load
from qwen3next_plugin.model.quantisation.files import read_formats
from qwen3next_plugin.model.quantisation.in_panels import check_in_panels
from qwen3next_plugin.model.quantisation.packing import check_invariance

PREFILL_GRAPHS = ("breakable", "disabled")
BACKEND_FLAGS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
ATTENTION_BACKENDS = (None, ATTENTION_BACKEND, HOST_BACKEND, TORCH_BACKEND)
KV_DTYPES = {"auto": "", "bf16": "bfloat16", "bfloat16": "bfloat16"}  # flag → the model's dtype
# Flag → SGLang's default, and ours on a CPU.
CPU_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "attention_backend": (None, ATTENTION_BACKEND),
    "mamba_radix_cache_strategy": ("auto", "no_buffer"),
    "disable_overlap_schedule": (False, True),
    "sleep_on_idle": (False, True),  # an idle server would keep a core busy polling for work
    # SGLang ends a server whose step takes longer; a long prompt on few cores may.
    "watchdog_timeout": (300, TIMEOUT),
    "max_running_requests": (None, 48),  # SGLang's own with drafts; without, it takes 2048
}


def check(server_args: Any, model_config: Any, *, on_cpu: bool) -> None:
    """Refuse a model, its files or flags that cannot be served.

    Raises:
        ConfigError, CheckpointError: names what is wrong and the fix.
        NotImplementedError: names a GPU's architecture that has no kernels.
    """
    check_flags(server_args, on_cpu=on_cpu)
    _check_variables(on_cpu=on_cpu)
    check_at_load(on_cpu=on_cpu)
    if env.batch_invariant():
        _check_invariance(model_config, on_cpu=on_cpu)
    _check_heads(model_config)
    _check_files(server_args, model_config, on_cpu=on_cpu)
    extras.check_flags("sglang", server_args)
    if on_cpu:
        _check_cpu(server_args, server_args._raw_input, model_config)
    elif env.kernels() != "reference":
        architecture(torch.device("cuda"))  # before weights are loaded onto it


def complete_on_cpu(server_args: Any) -> list[str]:
    """Fill in defaults; returns them as command-line flags."""
    bind_cores(server_args.tp_size * server_args.dp_size, server_args.nnodes)
    use_huge_pages()
    skip_trials()
    given = server_args._raw_input  # SGLang's own defaults for a CPU are filled in already
    chosen = {name: value for name, (unset, value) in CPU_DEFAULTS.items() if given[name] == unset}
    for name, value in chosen.items():
        setattr(server_args, name, value)
    words = [flag(name, value) for name, value in chosen.items()]
    words += extras.complete_flags("sglang", server_args)
    if all(given[name] is None for name in memory.GIVEN):
        words.append(memory.IN_WORDS)
    return words


def complete_on_gpu(server_args: Any) -> None:
    """Turn overlapping steps off if the radix cache does not allow them."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    if resolving_view(server_args).mamba_radix_cache_strategy == "no_buffer":
        declare_resolution(server_args, "qwen3next_plugin", disable_overlap_schedule=True)


@patch(
    When.REGISTERED,
    "sglang.srt.arg_groups.speculative_hook._handle_eagle_family",
    reason="Qwen's own command gives only the steps; SGLang then compares a missing topk with 1 "
    "and ends with a TypeError",
    remove_when="SGLang fills in the rest",
    upstream="https://github.com/sgl-project/sglang/pull/34361",
)
def complete_drafts(host: Callable[..., None], server_args: Any) -> None:
    """Around `_handle_eagle_family`: derive the flags that Qwen's own command leaves out.

    Raises:
        ConfigError: the number of steps is not given, but what depends on it.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    given = resolving_view(server_args)
    steps, topk = given.speculative_num_steps, given.speculative_eagle_topk
    num_tokens = given.speculative_num_draft_tokens
    missing: dict[str, int] = {}
    if (steps, topk, num_tokens) != (None, None, None) and is_ours(model_config_of(server_args)):
        if steps is None:
            raise ConfigError(
                "--speculative-num-steps is missing: add it (3, for instance), or leave out "
                "--speculative-eagle-topk and --speculative-num-draft-tokens"
            )
        if topk is None:
            missing["speculative_eagle_topk"] = topk = 1
        if num_tokens is None:
            missing["speculative_num_draft_tokens"] = steps * topk + 1
    if missing:
        declare_resolution(server_args, "qwen3next_plugin", **missing)
        flags = " ".join(flag(name, value) for name, value in missing.items())
        logger.info("qwen3next_plugin: %s, as %d steps ask for", flags, steps)
    host(server_args)


def check_flags(server_args: Any, *, on_cpu: bool) -> None:
    """Refuse flags that cannot be served, whatever the model.

    Raises:
        ConfigError: names the flag and the fix.
    """
    algorithm = server_args.speculative_algorithm
    check_served(server_args, served(drafts=bool(algorithm), on_cpu=on_cpu))
    if not on_cpu:
        _check_kernels(server_args.cuda_graph_config)
    if algorithm:
        _check_speculation(server_args, algorithm)


def check_served(server_args: Any, tables: Served) -> None:
    """Refuse values that are not in the tables."""
    for name, (values, why, fix) in tables.items():
        if (value := getattr(server_args, name)) not in values:
            raise refusal(name, value, why, fix)


def _check_variables(*, on_cpu: bool) -> None:
    """Refuse SGLang's environment variables that bypass our code."""
    from sglang.srt.environ import envs

    if envs.SGLANG_RUST_SERVER.get():
        raise ConfigError("SGLANG_RUST_SERVER: no plugin checks its requests; unset it")
    if on_cpu and envs.SGLANG_ENABLE_METRICS_DEVICE_TIMER.get():
        raise ConfigError("SGLANG_ENABLE_METRICS_DEVICE_TIMER: it times steps by CUDA; unset it")


def refusal(name: str, value: Any, why: str, fix: str) -> ConfigError:
    """One line: the flag as typed, why it is refused, and the fix."""
    return ConfigError(f"{flag(name, value)}: {why}; {fix}")


def flag(name: str, value: Any) -> str:
    """A flag as typed on the command line."""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def _check_heads(model_config: Any) -> None:
    """Refuse checkpoints for which SGLang would build another head than the output head."""
    for head in ("decision_config", "joint_head_config", "pointer_head"):
        if getattr(model_config, head, None) is not None:
            raise ConfigError(
                f"{head}: this checkpoint answers by a head of its own, which the plugin has not; "
                f"set QWEN3NEXT_DISABLE=1 to serve it with SGLang's own model"
            )


def _check_files(server_args: Any, model_config: Any, *, on_cpu: bool) -> None:
    """Refuse a config, and a local checkpoint with a tensor missing or of another shape.

    A checkpoint of a hub is checked as it loads.
    """
    hf_config = model_config.hf_config
    quantised = quantization_config(hf_config) is not None
    folder = Path(server_args.model_path)
    if not json.loads(server_args.json_model_override_args):
        check_kind(folder, OVERRIDE_FLAG)
    config = read_config(hf_config, server_args.tp_size)
    if not server_args.skip_tokenizer_init:
        tokenizer = Path(server_args.tokenizer_path or folder)
        check_tokenizer(tokenizer, config.vocab_size, "--tokenizer-path")
    for models in extras.models("sglang"):
        models.check(config, server_args)
    if model_config.is_multimodal:
        rope.check_images(config.rope_parameters, "--language-model-only")
    if server_args.speculative_algorithm:
        check_num_draft_layers(config, "--speculative-algorithm")
    formats = None
    if folder.is_dir() and server_args.load_format != "dummy":
        if on_cpu and (quantised or env.quantise()):
            formats = read_formats(folder, hf_config, quantization_config(hf_config))
            if note := formats.described():
                logger.info("qwen3next_plugin: %s", note)
        with_mtp = bool(server_args.speculative_algorithm)
        check_stored(folder, config, quantised=quantised, formats=formats, with_mtp=with_mtp)
        tp_size = server_args.tp_size
        check_in_panels(formats, on_cpu=on_cpu, tp_size=tp_size, say=logger.info)
    if on_cpu and not server_args.use_ray and (formats is not None or not quantised):
        itemsize = model_config.dtype.itemsize
        sizes = served_bytes(config, itemsize, formats, asked=env.quantise())
        check_weights(sizes, config, memory.local_ranks(server_args))
        memory.check_memory(sizes, server_args, model_config)


def _check_kernels(graphs: Any) -> None:
    """Refuse CUDA graphs that would capture a step's pages, or the reference kernels."""
    prefill = graphs.prefill.backend
    if prefill not in PREFILL_GRAPHS:
        why = "a prompt's graph must be cut at linear layers, whose rows change with each step"
        raise refusal("cuda_graph_backend_prefill", prefill, why, f"use {PREFILL_GRAPHS[0]}")
    if env.kernels() == "reference" and {prefill, graphs.decode.backend} != {"disabled"}:
        raise ConfigError(
            "QWEN3NEXT_KERNELS=reference: the reference reads tensors on the host, which a CUDA "
            "graph cannot hold; add --cuda-graph-backend-decode disabled "
            "--cuda-graph-backend-prefill disabled"
        )


def _check_invariance(model_config: Any, *, on_cpu: bool) -> None:
    """Refuse QWEN3NEXT_BATCH_INVARIANT unless our kernels compute every product."""
    from sglang.srt.utils import cpu_has_amx_support

    check_invariance(model_config.dtype, on_cpu=on_cpu)
    if cpu_has_amx_support():
        raise ConfigError(
            "QWEN3NEXT_BATCH_INVARIANT=1: SGLang's own AMX kernels, which depend on the batch, are "
            "installed; uninstall sgl-kernel"
        )


def _check_speculation(server_args: Any, algorithm: str) -> None:
    """Refuse drafts that are not from the checkpoint's MTP head, or too many of them."""
    if algorithm.upper() not in DRAFT_ALGORITHMS:
        raise refusal(
            *("speculative_algorithm", algorithm),
            "drafts come from the checkpoint's own MTP head",
            "use NEXTN, or leave it out to serve without drafts",
        )
    path = server_args.speculative_draft_model_path
    if path not in (None, server_args.model_path):
        raise refusal(
            *("speculative_draft_model_path", path),
            "drafts come from the checkpoint's own MTP head",
            LEAVE_OUT,
        )
    if (steps := server_args.speculative_num_steps) is not None:
        check_num_speculative_tokens(steps, "--speculative-num-steps")
    if server_args.speculative_adaptive:
        from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config

        most = max(resolve_candidate_steps_from_config(server_args.speculative_adaptive_config))
        check_num_speculative_tokens(most, "candidate_steps of --speculative-adaptive-config")


def _check_cpu(server_args: Any, given: dict[str, Any], model_config: Any) -> None:
    """Refuse attention backends and KV dtypes without CPU kernels; `given`: the command line."""
    for name in BACKEND_FLAGS:
        if given[name] not in ATTENTION_BACKENDS:
            raise refusal(name, given[name], "it does not run on a CPU", LEAVE_OUT)
        if given[name] in (TORCH_BACKEND, HOST_BACKEND):
            fix = f"use {ATTENTION_BACKEND}, or leave it out"
            if server_args.speculative_algorithm:
                raise refusal(name, given[name], "it does not verify drafts on every CPU", fix)
    value, dtype = server_args.kv_cache_dtype, str(model_config.dtype).removeprefix("torch.")
    if value != "auto" and KV_DTYPES.get(value) != dtype:
        raise refusal("kv_cache_dtype", value, f"the cache is of the model's {dtype}", LEAVE_OUT)
