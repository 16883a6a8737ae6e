"""QK norm and partial RoPE of the full-attention layer."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    apply_rotary_pos_emb,
)

from qwen3next_plugin.kernels.qk_norm_rope import qk_norm_rope
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS, POSITIONS = 1e-6, 50


def table(rotary_dim: int) -> torch.Tensor:
    """The engine's cache: cosines, then sines, of every position."""
    rates = 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(POSITIONS)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def theirs(x, weight, cos_sin, positions):
    """The model's norm and rotation of [T, heads, D] in fp32."""
    norm = Qwen3NextRMSNorm(x.shape[-1], eps=EPS)
    norm.weight.data = weight.float()
    normed = norm(x.float()).detach().transpose(0, 1)[None]  # [1, heads, T, D]
    cos, sin = cos_sin[positions].float().repeat(1, 2).unflatten(1, (2, 2, -1)).unbind(2)
    cos, sin = cos.flatten(1)[None], sin.flatten(1)[None]
    return apply_rotary_pos_emb(normed, normed, cos, sin)[0][0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize(
    ("Hq", "Hkv", "D", "rotary_dim"), [(4, 2, 256, 64), (3, 1, 40, 10), (2, 2, 32, 32)]
)
def test_against_the_model(backend, few, T, Hq, Hkv, D, rotary_dim, dtype):
    T = few(min(T, 5), T)  # on a GPU each token has a program of its own
    qkv = torch.randn(T, 2 * (Hq + Hkv) * D + 7).to(dtype)[:, :-7]
    q_weight, k_weight = torch.randn(2, D).to(dtype)
    cos_sin, positions = table(rotary_dim), torch.randint(POSITIONS, (T,))
    for cache in {cos_sin, cos_sin.to(dtype)}:
        q, k = qk_norm_rope(
            qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos_sin=cache, positions=positions,
            num_heads=Hq, num_kv_heads=Hkv, head_dim=D, rotary_dim=rotary_dim, eps=EPS,
        )  # fmt: skip
        query = qkv[:, : 2 * Hq * D].unflatten(1, (Hq, 2, D))[:, :, 0]
        key = qkv[:, 2 * Hq * D :][:, : Hkv * D].unflatten(1, (Hkv, D))
        assert_close("qk_norm_rope", dtype, q, theirs(query, q_weight, cache, positions))
        assert_close("qk_norm_rope", dtype, k, theirs(key, k_weight, cache, positions))


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"positions": torch.tensor([0, 50])}, RuntimeError, "token 1: position 50"),
        ({"positions": torch.tensor([-1, 0])}, RuntimeError, "token 0: position -1"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, ValueError, "positions is torch.int32"),
        ({"rotary_dim": 9}, ValueError, "cannot rotate 9"),
        ({"num_heads": 3}, ValueError, "qkv has shape"),
        ({"cos_sin": torch.zeros(50, 8)}, ValueError, "cos_sin has shape"),
        ({"cos_sin": torch.zeros(50)}, ValueError, r"cos_sin has shape \(50,\), not 2 dims"),
        ({"qkv": torch.zeros(128)}, ValueError, r"qkv has shape \(128,\), not 2 dims"),
    ],
)
def test_refuses(backend, change, error, complaint):
    arguments = {
        "qkv": torch.zeros(2, 128), "q_weight": torch.zeros(16), "k_weight": torch.zeros(16),
        "cos_sin": torch.zeros(50, 10), "positions": torch.zeros(2, dtype=torch.int64),
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "rotary_dim": 10, "eps": EPS,
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        qk_norm_rope(**{**arguments, **change})
