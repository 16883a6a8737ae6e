"""The one table of tolerances: (op, dtype of the activations) to a bound on |out - ref| / |ref|."""

import math

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

OPS = (
    "causal_conv1d",
    "fused_moe",
    "gated_delta_rule",
    "linear",
    "output_gate",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_gated",
    "router",
    "shared_expert_gate",
)
TOLERANCES = {
    **{(op, FP32): 1e-5 for op in OPS},
    **{(op, dtype): 8e-3 for op in OPS for dtype in (BF16, FP16)},
    ("state_after_512_steps", FP32): 1e-4,
}


def assert_close(op: str, dtype: torch.dtype, out: torch.Tensor, ref: torch.Tensor) -> None:
    """Fail unless out is finite and |out - ref| / |ref|, over the whole tensor, is in bounds."""
    assert out.shape == ref.shape
    assert out.isfinite().all(), f"{op}: non-finite output"
    difference = (out.double() - ref.double()).norm().item()
    scale = ref.double().norm().item()
    bound = TOLERANCES[op, dtype]
    error = difference / scale if scale else (0.0 if difference == 0 else math.inf)
    assert error <= bound, f"{op} {dtype}: relative error {error:.2e} > {bound:.0e}"
