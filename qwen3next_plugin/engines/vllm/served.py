"""vLLM's flags of which the plugin serves only some values, and these values."""

from typing import Any

from qwen3next_plugin.engines.extras import MISSING, flags_served
from qwen3next_plugin.engines.hub import PACKED, READ_BY_MODEL
from qwen3next_plugin.engines.vllm.names import WORKER

LOSSLESS = "drafts are the likeliest tokens; one is kept if it would be sampled without drafts"
WHOLE = "the whole checkpoint is read, and checked"
LEAVE_OUT = "leave it out"
Served = dict[str, tuple[tuple[Any, ...], str, str]]
# Field of VllmConfig → the values that are served, why no others, and the fix; {}: the value.
SERVED: Served = {
    "parallel_config.enable_ep_weight_filter": ((False,), WHOLE, LEAVE_OUT),
    "model_config.multimodal_config.mm_encoder_only": ((False,), WHOLE, LEAVE_OUT),
    "model_config.multimodal_config.video_pruning_rate": (
        (None, 0.0),
        "vLLM's towers of Qwen3.5 and later cannot",
        LEAVE_OUT,
    ),
}
SERVED_ON_CPU: Served = {
    "load_config.load_format": (READ_BY_MODEL, PACKED, LEAVE_OUT),
    "model_config.multimodal_config.mm_processor_cache_type": (
        ("lru",),
        "a step is one call of the worker, past vLLM's cache in shared memory",
        LEAVE_OUT,
    ),
    "cache_config.kv_offloading_size": ((None,), "KV is in this memory already", LEAVE_OUT),
    "watermark_config": ((None,), "it is for model runner V2, which has no CPU", LEAVE_OUT),
    "use_v2_model_runner": (
        (False,),
        "on a CPU the plugin's worker drafts and verifies with V1",
        "set VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    "parallel_config.worker_cls": (
        ("auto", WORKER),
        f"the plugin serves this model with its own worker, {WORKER}",
        "leave --worker-cls out",
    ),
    # It never allocates what passes between them, and lays KV out otherwise without attention.
    "parallel_config.pipeline_parallel_size": (
        (1,),
        "vLLM's CPU runner cannot run pipeline stages of a hybrid model",
        "use --tensor-parallel-size {}",
    ),
    "parallel_config.data_parallel_backend": (
        ("mp",),
        "on a CPU Ray places the workers of one engine only",
        "leave it out, or start servers behind a router",
    ),
}
# More, with drafts.
SERVED_WITH_DRAFTS: Served = {
    "speculative_config.draft_sample_method": (("greedy",), LOSSLESS, LEAVE_OUT),
    "speculative_config.rejection_sample_method": (("standard",), LOSSLESS, LEAVE_OUT),
    "speculative_config.disable_padded_drafter_batch": (
        (False,),
        "nothing is padded: rejected tokens are left out",
        LEAVE_OUT,
    ),
    "speculative_config.enable_adaptive_verification": (
        (False,),
        "vLLM would profile it on state pages that nothing has written",
        LEAVE_OUT,
    ),
}
# Unless an extra serves more.
OF_EXTRAS: Served = {
    "kv_transfer_config.kv_connector": ((None,), MISSING, "leave out --kv-transfer-config"),
}
OF_EXTRAS_ON_CPU: Served = {
    "parallel_config.nnodes": ((1,), MISSING, LEAVE_OUT),
}


def served(*, drafts: bool, on_cpu: bool) -> Served:
    """The tables that apply."""
    tables = SERVED | (SERVED_ON_CPU if on_cpu else {})
    rows, known = OF_EXTRAS | (OF_EXTRAS_ON_CPU if on_cpu else {}), flags_served("vllm")
    tables |= {field: row for field, row in rows.items() if field not in known}
    return tables | (SERVED_WITH_DRAFTS if drafts else {})
