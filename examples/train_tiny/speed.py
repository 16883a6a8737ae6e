"""Make training fast on a CPU without changing what is computed."""

import ctypes

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from .architecture import TinyQwen3Next

GROUP_ROWS = 128  # an expert's rows are a multiple of this
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@torch.compiler.disable  # its shapes depend on the data
def bf16_experts(self: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped experts with products in bf16: tokens sorted by expert, padded groups.

    A group has as many rows as the largest, rounded up: with a shape of its own in each step, a
    product is compiled anew, which takes far longer than to compute it.

    Shapes: x [T, D], chosen and weights [T, top_k] → [T, D].
    """
    top_k, experts = chosen.shape[-1], chosen.flatten()
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=self.num_experts)  # [E]
    rows = -(-int(counts.max()) // GROUP_ROWS) * GROUP_ROWS
    starts = torch.arange(self.num_experts) * rows - (counts.cumsum(0) - counts)
    place = torch.arange(len(order)) + starts[experts[order]]  # of each sorted token in its group
    padded = x.new_zeros(self.num_experts * rows, x.shape[1], dtype=torch.bfloat16)
    padded = padded.index_copy(0, place, x.bfloat16()[order // top_k])
    groups = padded.view(self.num_experts, rows, -1)  # [E, rows, D]
    up, down = (w.bfloat16().transpose(1, 2) for w in (self.gate_up_proj, self.down_proj))
    gate, value = (groups @ up).chunk(2, dim=-1)  # [E, rows, I]
    h = ((silu(gate) * value) @ down).flatten(0, 1)[place]  # [T*top_k, D]
    h = h[order.argsort()].view(*chosen.shape, -1)  # [T, top_k, D]
    return (h * weights[..., None]).sum(1).to(x.dtype)


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
