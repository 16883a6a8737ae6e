"""Make training fast on a CPU without changing what is computed."""

import ctypes

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from .architecture import TinyQwen3Next

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def bf16_experts(self: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped experts with products in bf16: tokens sorted by expert, one GEMM each.

    Shapes: x [T, D], chosen and weights [T, top_k] → [T, D].
    """
    top_k, x_dtype = chosen.shape[-1], x.dtype
    order = chosen.flatten().argsort(stable=True)
    experts = torch.arange(self.num_experts)[:, None]
    counts = (chosen.flatten() == experts).sum(1)  # [E]; bincount would break the compiled graph
    ends = counts.cumsum(0).to(torch.int32)
    up, down = (w.bfloat16().transpose(1, 2) for w in (self.gate_up_proj, self.down_proj))
    h = torch.ops.transformers.grouped_mm_fallback(x.bfloat16()[order // top_k], up, ends)
    gate, value = h.chunk(2, dim=-1)  # [T*top_k, I]
    h = torch.ops.transformers.grouped_mm_fallback(silu(gate) * value, down, ends)
    h = h[order.argsort()].view(*chosen.shape, -1)  # [T, top_k, D]
    return (h * weights[..., None]).sum(1).to(x_dtype)


def full_precision_delta_rule() -> None:
    """Keep transformers' chunked delta rule out of autocast: its triangular solve needs fp32."""
    rule = qwen3_next.torch_chunk_gated_delta_rule

    def in_fp32(*args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return rule(*args, **kwargs)

    qwen3_next.torch_chunk_gated_delta_rule = in_fp32


def keep_freed_memory() -> None:
    """Let glibc keep large buffers: fresh pages cost more than the element-wise work on them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def make_fast(model: TinyQwen3Next, compiled: bool) -> None:
    """Prepare process and model before the first step."""
    torch.set_flush_denormal(True)  # decays underflow, and denormals halve the speed
    keep_freed_memory()
    full_precision_delta_rule()
    ALL_EXPERTS_FUNCTIONS.register("train_tiny_bf16", bf16_experts)
    model.config._experts_implementation = "train_tiny_bf16"
    if compiled:
        for layer in [*model.trunk.model.layers, *model.mtp.layers]:
            layer.compile(dynamic=False)
