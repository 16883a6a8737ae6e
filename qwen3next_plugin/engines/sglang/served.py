"""SGLang's flags of which the plugin serves only some values, and these values."""

from typing import Any

from qwen3next_plugin.engines.extras import MISSING, flags_served
from qwen3next_plugin.engines.hub import PACKED, READ_BY_MODEL
from qwen3next_plugin.engines.sglang.names import ATTENTION_BACKEND, LORA_BACKEND
from qwen3next_plugin.model.state import STATE_DTYPES

PAGES = "a state page is kept and copied whole"
POOL = "state pages stay in one pool"
RANKS = "this model is spread over the ranks of --tp-size only"
BATCH = "a step runs one batch"
PLACED = "every rank has its part of each expert"
OWN = "the plugin brings its own linear attention"
UNQUANTISED = "there are no quantised kernels for a CPU here"
EXPERTS = "the plugin brings its own experts"
LOSSLESS = "a draft is kept only if it is what would be sampled without drafts"
NO_LORA = "SGLang has no place for adapters of linear attention, and ours are for CPUs"
UNCHECKED = "the plugin checks requests that come over HTTP"
LEAVE_OUT = "leave it out"
FOLDER = "on CPUs FolderLinker keeps prefixes in a folder (docs/fleet.md)"
LORA_DEFAULT = "csgmv"  # SGLang's --lora-backend where none is given
Served = dict[str, tuple[tuple[Any, ...], str, str]]
# Flag → the values that are served, why no others, and the fix.
SERVED: Served = {
    # model and weights
    "model_impl": (("auto", "sglang"), "the plugin brings its own model", LEAVE_OUT),
    "is_embedding": ((False,), "the models generate text", LEAVE_OUT),
    "encoder_only": ((False,), "the text model is part of the plugin's", LEAVE_OUT),
    "tokenizer_worker_num": ((1,), "SGLang loads no plugin in these processes", LEAVE_OUT),
    # servers
    "smg_grpc_mode": ((False,), UNCHECKED, LEAVE_OUT),
    "grpc_mode": ((False,), UNCHECKED, LEAVE_OUT),
    "grpc_port": ((None,), UNCHECKED, LEAVE_OUT),
    # ranks
    "pp_size": ((1,), RANKS, "use --tp-size"),
    "ep_size": ((1,), RANKS, "use --tp-size"),
    "moe_a2a_backend": (("none",), RANKS, "use --tp-size"),
    "attn_dp_size": ((1,), RANKS, "use --tp-size, or --dp-size without --enable-dp-attention"),
    "moe_dp_size": ((1,), RANKS, "use --tp-size"),
    "attn_cp_size": ((1,), RANKS, "use --tp-size"),
    "dcp_size": ((1,), RANKS, "use --tp-size"),
    "enable_prefill_cp": ((False,), RANKS, "use --tp-size"),
    # kernels and steps
    "enable_two_batch_overlap": ((False,), BATCH, LEAVE_OUT),
    "enable_pdmux": ((False,), BATCH, LEAVE_OUT),
    "enable_torch_compile": ((False,), "the model's operators are not compiled", LEAVE_OUT),
    "moe_dense_tp_size": ((None,), "every rank computes its part of each layer", LEAVE_OUT),
    "enable_eplb": ((False,), PLACED, LEAVE_OUT),
    "init_expert_location": (("trivial",), PLACED, LEAVE_OUT),
    "ep_num_redundant_experts": ((0,), PLACED, LEAVE_OUT),
    "ep_dispatch_algorithm": ((None,), PLACED, LEAVE_OUT),
    "expert_distribution_recorder_mode": ((None,), PLACED, LEAVE_OUT),
    "expert_balancedness_report_mode": (("off",), PLACED, LEAVE_OUT),
    "linear_attn_backend": (("triton",), OWN, LEAVE_OUT),
    "linear_attn_decode_backend": ((None, "triton"), OWN, LEAVE_OUT),
    "linear_attn_prefill_backend": ((None, "triton"), OWN, LEAVE_OUT),
    "linear_attn_verify_backend": ((None, "triton"), OWN, LEAVE_OUT),
    "enable_mis": ((False,), "the items of one sequence would share a state", LEAVE_OUT),
    # state
    "enable_linear_replayssm": ((False,), PAGES, LEAVE_OUT),
    "enable_linear_replayssm_spec": ((False,), PAGES, LEAVE_OUT),
    "enable_int8_mamba_checkpoint": ((False,), PAGES, LEAVE_OUT),
    "enable_page_major_kv_layout": ((False,), PAGES, LEAVE_OUT),
    "enable_unified_memory": ((False,), PAGES, LEAVE_OUT),
    "mamba_ssm_dtype": ((None, *STATE_DTYPES), "no kernel keeps such a state", LEAVE_OUT),
    # where state and caches are kept
    "enable_hierarchical_cache": ((False,), POOL, FOLDER),
    "radix_cache_backend": ((None,), POOL, LEAVE_OUT),
    "strip_thinking_cache": ((False,), "it ends SGLang after a retraction", LEAVE_OUT),
    "enable_lmcache": ((False,), POOL, LEAVE_OUT),
    "enable_flexkv": ((False,), POOL, LEAVE_OUT),
}
SERVED_ON_CPU: Served = {
    "load_format": (READ_BY_MODEL, PACKED, LEAVE_OUT),
    "moe_runner_backend": (("auto", "triton"), EXPERTS, LEAVE_OUT),
    "enable_return_routed_experts": ((False,), "SGLang pins memory by CUDA", LEAVE_OUT),
    "enable_forward_pass_metrics": ((False,), "SGLang times steps by CUDA", LEAVE_OUT),
    "enable_layerwise_nvtx_marker": ((False,), "NVTX is CUDA's", LEAVE_OUT),
    "mamba_radix_cache_strategy": (("auto", "no_buffer"), PAGES, "use no_buffer"),
    "page_size": ((None, 1), "on a CPU a KV page holds one token", LEAVE_OUT),
    "cpu_offload_gb": ((0,), "the weights are in CPU memory already", LEAVE_OUT),
    "ple_offload_embedding": ((None, False), "n-grams are read where their files are", LEAVE_OUT),
    "qsa_indexer_dtype": (("auto",), "index keys are of the activations' dtype", LEAVE_OUT),
    "quantization": ((None,), UNQUANTISED, "serve the released checkpoint as it is"),
    "lora_backend": ((LORA_DEFAULT, LORA_BACKEND), "it does not run on a CPU", LEAVE_OUT),
    "enable_lora_overlap_loading": (
        (None, False),
        "on a CPU adapters are used where they are",
        LEAVE_OUT,
    ),
}
SERVED_ON_GPU: Served = {
    "enable_lora": ((None, False), NO_LORA, LEAVE_OUT),
    "lora_paths": ((None, [], {}), NO_LORA, LEAVE_OUT),
    "disaggregation_mode": (("null",), "pages are handed over between CPUs only", LEAVE_OUT),
    "mamba_radix_cache_strategy": (
        ("auto", "no_buffer", "extra_buffer"),
        "a slot for the next page is reserved before it is needed",
        "use extra_buffer",
    ),
}
# More, with drafts.
SERVED_WITH_DRAFTS: Served = {
    "speculative_accept_threshold_single": ((1.0,), LOSSLESS, LEAVE_OUT),
    "speculative_accept_threshold_acc": ((1.0,), LOSSLESS, LEAVE_OUT),
    "enable_multi_layer_eagle": ((False,), "the drafter is one layer", LEAVE_OUT),
    "decoupled_spec_role": (("null",), "drafter and model share embedding and head", LEAVE_OUT),
    "grammar_backend": (
        (None, "xgrammar", "llguidance", "none"),
        "its grammars cannot take a draft back",
        "use xgrammar",
    ),
}
SERVED_WITH_DRAFTS_ON_CPU: Served = {
    "speculative_draft_load_format": ((None, *READ_BY_MODEL), PACKED, LEAVE_OUT),
    "speculative_moe_runner_backend": ((None, "auto", "triton"), EXPERTS, LEAVE_OUT),
    "speculative_draft_model_quantization": ((None,), UNQUANTISED, LEAVE_OUT),
    "speculative_draft_kv_cache_dtype": ((None, "auto"), UNQUANTISED, LEAVE_OUT),
    "speculative_draft_attention_backend": (
        (None, ATTENTION_BACKEND),
        "no other backend drafts on a CPU",
        LEAVE_OUT,
    ),
    "enable_mixed_chunk": ((False,), "a step reads prompts or verifies drafts", LEAVE_OUT),
    "speculative_use_rejection_sampling": ((False,), LOSSLESS, LEAVE_OUT),
    "watermark_config": ((None,), "the plain sampler verifies drafts", LEAVE_OUT),
    "speculative_adaptive": (
        (False,),
        "drafts already have the length that is fastest (QWEN3NEXT_DRAFTS=adaptive)",
        LEAVE_OUT,
    ),
    "speculative_token_map": ((None,), "the drafter's head has all tokens", LEAVE_OUT),
    "speculative_draft_window_size": ((None,), "the drafter attends to all tokens", LEAVE_OUT),
}
SERVED_WITH_DRAFTS_ON_GPU: Served = {
    "enable_streaming_session": (
        (False,),
        "the state may be ahead of the last token when an answer ends",
        LEAVE_OUT,
    ),
    "speculative_eagle_topk": ((None, 1), "draft trees are verified on a CPU only", "use 1"),
}

# Unless an extra serves more.
OF_EXTRAS: Served = {
    "enable_unified_cache_external_linker": ((False,), MISSING, LEAVE_OUT),
    "disaggregation_mode": (("null",), MISSING, LEAVE_OUT),
}
OF_EXTRAS_ON_CPU: Served = {
    "nnodes": ((1,), MISSING, LEAVE_OUT),
    "enable_lora": ((None, False), MISSING, LEAVE_OUT),
    "lora_paths": ((None, [], {}), MISSING, LEAVE_OUT),
}


def served(*, drafts: bool, on_cpu: bool) -> Served:
    """The tables that apply."""
    rows, known = OF_EXTRAS | (OF_EXTRAS_ON_CPU if on_cpu else {}), flags_served("sglang")
    tables = SERVED | {name: row for name, row in rows.items() if name not in known}
    tables |= SERVED_ON_CPU if on_cpu else SERVED_ON_GPU
    if drafts:
        tables |= SERVED_WITH_DRAFTS
        tables |= SERVED_WITH_DRAFTS_ON_CPU if on_cpu else SERVED_WITH_DRAFTS_ON_GPU
    return tables
