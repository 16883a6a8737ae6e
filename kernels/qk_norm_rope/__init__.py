"""Zero-centred QK norm and partial rotary embedding of the full-attention layer, in one pass."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, INT64, check, sizes


def qk_norm_rope(
    *,
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
    """RoPE(x rsqrt(mean x^2 + eps) (1 + weight)) of every query and key head, in fp32.

    Rotates the first rotary_dim dims of a head (NeoX pairing: i with i + rotary_dim / 2).

    Shapes (Hq = num_heads, Hkv = num_kv_heads, D = head_dim):
        qkv: [T, 2 * Hq * D + 2 * Hkv * D], any stride of dim 0: per query head [query | gate], k, v
        q_weight, k_weight: [D], fp32 or qkv's dtype
        cos_sin: [positions, rotary_dim], the cosines then the sines, fp32 or qkv's dtype
        positions: [T] int64
        returns q [T, Hq * D], k [T, Hkv * D], contiguous

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a position outside cos_sin.

    Source: `Qwen3NextAttention` of transformers.
    """
    op = "qk_norm_rope"
    run = dispatch.implementation(op, qkv.device)
    T, _ = sizes(op, "qkv", qkv, 2)
    length, _ = sizes(op, "cos_sin", cos_sin, 2)
    width = 2 * (num_heads + num_kv_heads) * head_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"{op}: cannot rotate {rotary_dim} of {head_dim} dims")
    parameters = (qkv.dtype, *FLOAT)
    check(op, "qkv", qkv, (T, width), ACTIVATIONS, qkv.device)
    check(op, "q_weight", q_weight, (head_dim,), parameters, qkv.device)
    check(op, "k_weight", k_weight, (head_dim,), (q_weight.dtype,), qkv.device)
    check(op, "cos_sin", cos_sin, (length, rotary_dim), parameters, qkv.device)
    check(op, "positions", positions, (T,), INT64, qkv.device)
    heads = (num_heads, num_kv_heads, head_dim, rotary_dim)
    return run(qkv, q_weight, k_weight, cos_sin, positions, *heads, eps)
