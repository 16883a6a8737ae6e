"""Names that must exist; calling one raises, because the stand-in does not implement it."""

from collections.abc import Callable
from typing import NoReturn

import torch

from sgl_kernel.operators import LIBRARY, NAMESPACE

# Read from torch.ops.sgl_kernel when SGLang's modules are imported on a CPU.
TAKEN_ON_IMPORT = {
    "fused_dual_residual_rmsnorm_cpu": "Grok",
    "fused_gdn_gating_cpu": "SGLang's own Gated DeltaNet",
    "fused_moe_router_cpu": "Grok",
    "fused_qk_gemma_rmsnorm_cpu": "Qwen3.5",
    "fused_qk_gemma_rmsnorm_with_gate_cpu": "Qwen3.5",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu": "Qwen3.5",
    "fused_sigmoid_gating_delta_rule_update_cpu": "SGLang's own Gated DeltaNet",
    "fused_sigmoid_mul_cpu": "Qwen3.5 and Muse Glimmer",
    "rmsnorm_cpu": "Grok",
}
# SGLang's `register_fake_ops` (--enable-torch-compile) registers fakes for these, and fails if one
# does not exist. They are called on processors with AMX only.
GIVEN_A_FAKE = [
    "apply_multidimensional_rope_cpu",
    "apply_rotary_pos_emb_cpu",
    "biased_grouped_topk_cpu",
    "bmm_cpu",
    "causal_conv1d_fwd_cpu",
    "causal_conv1d_update_cpu",
    "chunk_gated_delta_rule_cpu",
    "fp8_per_tensor_scaled_mm_cpu",
    "fp8_scaled_mm_cpu",
    "fused_add_layernorm_cpu",
    "fused_add_rmsnorm_cpu",
    "fused_experts_cpu",
    "fused_input_proj_cpu",
    "fused_linear_sigmoid_mul",
    "fused_qk_rmsnorm_cpu",
    "fused_qk_rmsnorm_apply_from_stats_cpu",
    "fused_qk_rmsnorm_sumsq_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_rmsnorm_gated_cpu",
    "gelu_and_mul_cpu",
    "gelu_tanh_and_mul_cpu",
    "gemma3_rmsnorm_cpu",
    "gemma4_rmsnorm_cpu",
    "gemma_fused_add_rmsnorm_cpu",
    "gemma_rmsnorm_cpu",
    "grouped_topk_cpu",
    "int4_scaled_mm_cpu",
    "int8_scaled_mm_cpu",
    "int8_scaled_mm_with_quant",
    "l2norm_cpu",
    "layernorm_cpu",
    "multimodal_rotary_embedding_cpu",
    "mxfp4_scaled_mm_cpu",
    "per_token_quant_int8_cpu",
    "qkv_proj_with_rope",
    "qkv_proj_with_rope_fused_weight",
    "rotary_embedding_cpu",
    "shared_expert_cpu",
    "shm_allgather",
    "shm_allreduce",
    "silu_and_mul_cpu",
    "topk_sigmoid_cpu",
    "topk_softmax_cpu",
    "weight_packed_linear",
]


def refused(name: str, caller: str) -> Callable[..., NoReturn]:
    """A function that raises; the error names it and what the stand-in serves."""

    def refuse(*arguments: object, **named: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}, called by {caller}: this sgl_kernel is qwen3next_plugin's "
            "stand-in, which serves Qwen3-Next only on a machine without a GPU; another model "
            "needs a build of sgl_kernel for this machine"
        )

    refuse.__name__ = name
    return refuse


def _declare(name: str, caller: str) -> None:
    """Define the operator, so that a fake can be registered for it; calling it raises."""
    LIBRARY.define(f"{name}() -> ()")
    setattr(getattr(torch.ops, NAMESPACE), name, refused(name, caller))


for _name, _caller in TAKEN_ON_IMPORT.items():
    _declare(_name, _caller)
for _name in GIVEN_A_FAKE:
    _declare(_name, "SGLang's paths for processors with AMX")
