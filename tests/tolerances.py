"""The one table of tolerances: (op, dtype of the activations) to a bound on each row's error."""

import math
import os

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

OPS = (
    "causal_conv1d",
    "dilated_conv1d",
    "fused_moe",
    "gated_delta_rule",
    "hyper_connection",
    "linear",
    "output_gate",
    "paged_attention",
    "ple_gate",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_gated",
    "router",
    "shared_expert_gate",
    "silu_and_mul",
)
TOLERANCES = {
    **{(op, FP32): 1e-5 for op in OPS},
    **{(op, dtype): 8e-3 for op in OPS for dtype in (BF16, FP16)},
    ("state_after_512_steps", FP32): 1e-4,
    ("transformers", FP32): 2e-5,  # which sums in fp32, too: measured 1.1e-5
}
# Of a row, where Triton's kernels multiply bf16 with what cancels (measured: 3.7e-2); of the whole
# tensor the table's number holds.
ON_TENSOR_CORES = {("gated_delta_rule", BF16): 5e-2}
# Of a mean row: one that cancels to less is measured by this, since its terms were larger.
LEAST = 1 / 4


def assert_close(
    op: str, dtype: torch.dtype, out: torch.Tensor, ref: torch.Tensor, *, by: str | None = None
) -> None:
    """Fail unless out is finite and |out - ref| / |ref| in bounds for each row of the last dim."""
    assert out.shape == ref.shape
    assert out.isfinite().all(), f"{op}: non-finite output"
    if not out.numel():
        return
    difference = (out.double() - ref.double()).norm(dim=-1)
    scale = ref.double().norm(dim=-1)
    scale = scale.clamp(min=LEAST * scale.square().mean().sqrt().item())
    bound = TOLERANCES[op, dtype]
    if (by or os.environ.get("QWEN3NEXT_KERNELS")) == "triton":
        assert difference.norm() <= bound * ref.double().norm(), f"{op} {dtype}: the whole tensor"
        bound = ON_TENSOR_CORES.get((op, dtype), bound)
    relative = (difference / scale).nan_to_num(0, posinf=math.inf)  # 0 / 0: both are zero
    error, row = relative.flatten().max(dim=0)
    assert error <= bound, f"{op} {dtype}: relative error {error:.2e} > {bound:.0e} in row {row}"
