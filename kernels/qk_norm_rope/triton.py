"""QK norm and partial RoPE in Triton: a head in registers."""

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.gpu.rows import record_fault

POSITION = tl.constexpr(faults.POSITION)


def run(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op. A bad position gives NaN, and `faults.check` raises."""
    T, D = len(qkv), head_dim
    q, k = qkv.new_empty(T * (num_heads + num_kv_heads) * D).split(
        [T * num_heads * D, T * num_kv_heads * D]
    )
    if T:
        _qk_norm_rope[T, num_heads + num_kv_heads](
            qkv, qkv.stride(0), q_weight, k_weight, cos_sin, cos_sin.stride(0), positions, q, T,
            faults.record(qkv.device), len(cos_sin), eps,
            HQ=num_heads, HKV=num_kv_heads, D=D, ROTARY=rotary_dim, BD=next_power_of_2(D),
            **config_for(qkv.device).commit.options(),
        )  # fmt: skip
    return faults.checked(q.view(T, num_heads * D)), k.view(T, num_kv_heads * D)


@triton.jit
def _weight(q_weight, k_weight, at, mask, is_q):
    of_q = tl.load(q_weight + at, mask=mask & is_q, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + at, mask=mask & (is_q == 0), other=0.0).to(tl.float32)
    return 1.0 + of_q + of_k


@triton.jit(do_not_specialize=["known", "T"])
def _qk_norm_rope(
    qkv, row, q_weight, k_weight, cos_sin, cos_sin_row, positions, out, T, record, known, eps,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One head of one token; grid (T, HQ + HKV). Writes q [T, HQ, D], then k [T, HKV, D], to out.

    Triton 3.6 cannot compile a pointer chosen by a condition for AMD, so offsets are chosen.
    """
    HALF: tl.constexpr = ROTARY // 2
    t, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_q = h < HQ
    x = qkv + t * row + tl.where(is_q, 2 * h, HQ + h) * D
    out += tl.where(is_q, t * HQ + h, T.to(tl.int64) * HQ + t * HKV + h - HQ) * D
    at = tl.arange(0, BD)
    inside, turns = at < D, at < ROTARY
    partner = tl.where(at < HALF, at + HALF, at - HALF)  # the dim it is paired with
    position = tl.load(positions + t)
    is_known = (position >= 0) & (position < known)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    y *= scale * _weight(q_weight, k_weight, at, inside, is_q)
    other = tl.load(x + partner, mask=turns, other=0.0).to(tl.float32)
    other *= scale * _weight(q_weight, k_weight, partner, turns, is_q)
    angle = cos_sin + position * cos_sin_row + at % HALF
    cos = tl.load(angle, mask=turns & is_known, other=0.0).to(tl.float32)
    sin = tl.load(angle + HALF, mask=turns & is_known, other=0.0).to(tl.float32)
    turned = y * cos + tl.where(at < HALF, -other, other) * sin
    y = tl.where(turns, turned, y)
    y = tl.where(is_known, y, float("nan"))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        kind = tl.where(is_known, 0, POSITION)
        record_fault(record, kind, t, position, 0, 0, 0, 0, 0, known, 0)
