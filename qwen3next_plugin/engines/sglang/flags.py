"""Flags: what is filled in, and what is refused before a process starts."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_num_speculative_tokens,
)
from qwen3next_plugin.engines.sglang.names import (
    ATTENTION_BACKEND,
    DRAFT_ALGORITHMS,
    HOST_BACKEND,
    TORCH_BACKEND,
    is_ours,
    logger,
)

PAGES = "a state page is kept and copied whole"
POOL = "state pages stay in one pool"
RANKS = "this model is spread over the ranks of --tp-size only"
BATCH = "a step runs one batch"
OWN = "the plugin brings its own linear attention"
UNQUANTISED = "there are no quantised kernels for a CPU here"
LOSSLESS = "a draft is kept where it is what is sampled without drafts"
NO_LORA = "SGLang adapts none of this model's layers"
LEAVE_OUT = "leave it out"
Served = dict[str, tuple[tuple[Any, ...], str, str]]
# Flag → the values that can be served, why no others, and the mend.
SERVED: Served = {
    "model_impl": (("auto", "sglang"), "the plugin brings its own model", LEAVE_OUT),
    # the state
    "enable_linear_replayssm": ((False,), PAGES, LEAVE_OUT),
    "enable_linear_replayssm_spec": ((False,), PAGES, LEAVE_OUT),
    "enable_int8_mamba_checkpoint": ((False,), PAGES, LEAVE_OUT),
    "enable_page_major_kv_layout": ((False,), PAGES, LEAVE_OUT),
    "enable_unified_memory": ((False,), PAGES, LEAVE_OUT),
    "mamba_ssm_dtype": ((None, "float32", "bfloat16"), "no kernel keeps such a state", LEAVE_OUT),
    # where caches lie
    "enable_hierarchical_cache": ((False,), POOL, LEAVE_OUT),
    "radix_cache_backend": ((None,), POOL, LEAVE_OUT),
    "enable_lmcache": ((False,), POOL, LEAVE_OUT),
    "enable_flexkv": ((False,), POOL, LEAVE_OUT),
    "disaggregation_mode": (("null",), "state pages stay in one process", LEAVE_OUT),
    # ranks
    "pp_size": ((1,), RANKS, "use --tp-size"),
    "ep_size": ((1,), RANKS, "use --tp-size"),
    "moe_a2a_backend": (("none",), RANKS, "use --tp-size"),
    "attn_dp_size": ((1,), RANKS, "use --tp-size, or --dp-size without --enable-dp-attention"),
    "moe_dp_size": ((1,), RANKS, "use --tp-size"),
    "attn_cp_size": ((1,), RANKS, "use --tp-size"),
    "dcp_size": ((1,), RANKS, "use --tp-size"),
    "enable_prefill_cp": ((False,), RANKS, "use --tp-size"),
    # steps
    "enable_two_batch_overlap": ((False,), BATCH, LEAVE_OUT),
    "enable_pdmux": ((False,), BATCH, LEAVE_OUT),
    "enable_torch_compile": ((False,), "the model's operators run as they are", LEAVE_OUT),
    "linear_attn_backend": (("triton",), OWN, LEAVE_OUT),
    "linear_attn_decode_backend": ((None, "triton"), OWN, LEAVE_OUT),
    "linear_attn_prefill_backend": ((None, "triton"), OWN, LEAVE_OUT),
    "linear_attn_verify_backend": ((None, "triton"), OWN, LEAVE_OUT),
    # weights
    "enable_lora": ((None, False), NO_LORA, LEAVE_OUT),
    "lora_paths": ((None, [], {}), NO_LORA, LEAVE_OUT),
}
SERVED_ON_CPU: Served = {
    "mamba_radix_cache_strategy": (("auto", "no_buffer"), PAGES, "use no_buffer"),
    "page_size": ((None, 1), "a CPU's pools are of single tokens", LEAVE_OUT),
    "cpu_offload_gb": ((0,), "the weights are in this memory already", LEAVE_OUT),
    "quantization": ((None,), UNQUANTISED, "serve the released checkpoint as it is"),
}
SERVED_ON_GPU: Served = {
    "mamba_radix_cache_strategy": (
        ("auto", "no_buffer", "extra_buffer"),
        "a slot for the next page is there before it is wanted",
        "use extra_buffer",
    ),
}
# The same with drafts.
SERVED_WITH_DRAFTS: Served = {
    "speculative_accept_threshold_single": ((1.0,), LOSSLESS, LEAVE_OUT),
    "speculative_accept_threshold_acc": ((1.0,), LOSSLESS, LEAVE_OUT),
    "enable_multi_layer_eagle": ((False,), "the drafter is one layer", LEAVE_OUT),
    "decoupled_spec_role": (("null",), "drafter and model share embedding and head", LEAVE_OUT),
}
SERVED_WITH_DRAFTS_ON_CPU: Served = {
    "speculative_draft_model_quantization": ((None,), UNQUANTISED, LEAVE_OUT),
    "speculative_draft_kv_cache_dtype": ((None, "auto"), UNQUANTISED, LEAVE_OUT),
    "speculative_draft_attention_backend": (
        (None, ATTENTION_BACKEND),
        "no other backend drafts on a CPU",
        LEAVE_OUT,
    ),
    "enable_mixed_chunk": ((False,), "a step reads prompts or verifies drafts", LEAVE_OUT),
    "speculative_use_rejection_sampling": ((False,), LOSSLESS, LEAVE_OUT),
    "speculative_adaptive": (
        (False,),
        "drafts are as long as they pay already (QWEN3NEXT_DRAFTS=adaptive)",
        LEAVE_OUT,
    ),
    "speculative_token_map": ((None,), "the drafter's head has all tokens", LEAVE_OUT),
    "speculative_draft_window_size": ((None,), "the drafter attends to all tokens", LEAVE_OUT),
}
SERVED_WITH_DRAFTS_ON_GPU: Served = {
    "speculative_eagle_topk": ((None, 1), "draft trees are verified on a CPU only", "use 1"),
    "speculative_adaptive": (
        (False,),
        "a page has room for the drafts of --speculative-num-steps",
        LEAVE_OUT,
    ),
}
PREFILL_GRAPHS = ("breakable", "disabled")
ATTENTION_BACKENDS = (None, ATTENTION_BACKEND, HOST_BACKEND, TORCH_BACKEND)
KV_DTYPES = {"auto": "", "bf16": "bfloat16", "bfloat16": "bfloat16"}  # flag → the model's dtype


def read_config(hf_config: Any, tp_size: int) -> Qwen3NextConfig:
    """Our view of the model's config on this many ranks; complains where it cannot be served."""
    return Qwen3NextConfig.from_hf(
        hf_config, tp_size=tp_size, override_flag="--json-model-override-args"
    )


def check_flags(server_args: Any, *, on_cpu: bool) -> None:
    """Refuse flags that cannot be honoured.

    Raises:
        ConfigError: naming the flag and the mend.
    """
    algorithm = server_args.speculative_algorithm
    served = SERVED | (SERVED_ON_CPU if on_cpu else SERVED_ON_GPU)
    if algorithm:
        with_drafts = SERVED_WITH_DRAFTS_ON_CPU if on_cpu else SERVED_WITH_DRAFTS_ON_GPU
        served |= SERVED_WITH_DRAFTS | with_drafts
    for name, (values, why, mend) in served.items():
        if (value := getattr(server_args, name)) not in values:
            raise refusal(name, value, why, mend)
    if not on_cpu:
        _check_graphs(server_args.cuda_graph_config)
    if algorithm:
        _check_drafts(server_args, algorithm)


def check_cpu_flags(server_args: Any, given: dict[str, Any], model_config: Any) -> None:
    """Refuse what does not run on a CPU; `given` are the flags of the command line.

    Raises:
        ConfigError: naming the flag and the mend.
    """
    _check_attention(server_args, given)
    _check_kv_dtype(server_args, model_config)


def refusal(name: str, value: Any, why: str, mend: str) -> ConfigError:
    """One line: the flag as it is written, why, and the mend."""
    return ConfigError(f"{flag(name, value)}: {why}; {mend}")


def flag(name: str, value: Any) -> str:
    """A flag as one writes it."""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def _check_attention(server_args: Any, given: dict[str, Any]) -> None:
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if given[name] not in ATTENTION_BACKENDS:
            raise refusal(name, given[name], "it does not run on a CPU", LEAVE_OUT)
        if given[name] in (TORCH_BACKEND, HOST_BACKEND) and server_args.speculative_algorithm:
            mend = f"use {ATTENTION_BACKEND}, or leave it out"
            raise refusal(name, given[name], "it does not verify drafts on every CPU", mend)


def _check_kv_dtype(server_args: Any, model_config: Any) -> None:
    value, dtype = server_args.kv_cache_dtype, str(model_config.dtype).removeprefix("torch.")
    if value != "auto" and KV_DTYPES.get(value) != dtype:
        raise refusal("kv_cache_dtype", value, f"the cache is of the model's {dtype}", LEAVE_OUT)


def _check_graphs(config: Any) -> None:
    prefill = config.prefill.backend
    if prefill not in PREFILL_GRAPHS:
        why = "a prompt's graph is cut at linear layers, whose rows are others each time"
        raise refusal("cuda_graph_backend_prefill", prefill, why, f"use {PREFILL_GRAPHS[0]}")
    if env.kernels() == "reference" and {prefill, config.decode.backend} != {"disabled"}:
        raise ConfigError(
            "QWEN3NEXT_KERNELS=reference: the reference reads tensors on the host, which a CUDA "
            "graph cannot hold; add --cuda-graph-backend-decode disabled "
            "--cuda-graph-backend-prefill disabled"
        )


def _check_drafts(server_args: Any, algorithm: str) -> None:
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


def complete_drafts(host: Callable[..., None], server_args: Any) -> None:
    """Around `_handle_eagle_family`: a chain of as many drafts as there are steps.

    Qwen's own command names the steps only; SGLang 0.5.23 then compares a missing topk with 1 and
    dies. Can go when it fills in the rest itself.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    given = resolving_view(server_args)
    steps, topk = given.speculative_num_steps, given.speculative_eagle_topk
    missing: dict[str, int] = {}
    if steps is not None and is_ours(model_config_of(server_args)):
        if topk is None:
            missing["speculative_eagle_topk"] = topk = 1
        if given.speculative_num_draft_tokens is None:
            missing["speculative_num_draft_tokens"] = steps * topk + 1
    if missing:
        declare_resolution(server_args, "qwen3next_plugin", **missing)
        flags = " ".join(flag(name, value) for name, value in missing.items())
        logger.info("qwen3next_plugin: %s, as %d steps ask for", flags, steps)
    host(server_args)
