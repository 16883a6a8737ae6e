"""Gated attention around a host's attention is transformers' Qwen3NextAttention."""

import pytest
import torch

from checkpoints import BASE, SHAPES
from model.plain import PLAIN, stacked
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.attention import (
    AttentionShape,
    GatedAttention,
    mrope_axes,
    mrope_table,
    prepare,
)

CONFIGS = {"base": {}, **SHAPES}


def modules(changes: dict):
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    config = modeling.Qwen3NextConfig(**(BASE | changes))
    config._attn_implementation = "eager"
    layer = modeling.Qwen3NextAttention(config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
            parameter /= parameter.shape[-1] ** 0.5
    return config, layer, modeling.Qwen3NextRotaryEmbedding(config)


class CausalAttention(torch.nn.Module):
    """What a host does: causal attention, key-value heads shared."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: str
    ) -> torch.Tensor:
        assert batch == "batch"
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )
        return attended[0].transpose(0, 1).flatten(1).contiguous()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("T", [1, 17])
@torch.inference_mode()
def test_agrees_with_transformers(changes, T):
    config, layer, rotary = modules(changes)
    start = 5  # rotary tables are read at the positions, not from 0
    x = torch.randn(T, config.hidden_size, generator=torch.Generator().manual_seed(4))
    positions = torch.arange(start, start + T)
    mask = torch.full((1, 1, T, T), float("-inf")).triu(1)
    expected, _ = layer(x[None], rotary(x, positions[None]), mask)

    ours = GatedAttention(
        Qwen3NextConfig.from_hf(config), PLAIN, "", attn=CausalAttention(config.head_dim)
    )
    ours.load_state_dict(stacked(layer.state_dict(), "qkv_proj", ["q_proj", "k_proj", "v_proj"]))
    torch.testing.assert_close(ours(positions, x, "batch"), expected[0], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_value_and_gate_are_views_and_the_projection_is_kept():
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=8)
    qkv = torch.randn(3, 4 * 64 + 2 * 2 * 32)
    before = qkv.clone()
    q, k, v, gate = prepare(
        qkv=qkv,
        q_weight=torch.zeros(32),
        k_weight=torch.zeros(32),
        cos_sin=torch.randn(9, 8),
        positions=torch.tensor([0, 8, 3]),
        shape=shape,
        eps=1e-6,
    )
    assert (q.shape, k.shape, v.shape, gate.shape) == ((3, 128), (3, 64), (3, 64), (3, 4, 32))
    storage = qkv.untyped_storage().data_ptr()
    assert {x.untyped_storage().data_ptr() for x in (v, gate)} == {storage}
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("sections", [[11, 11, 10], [3, 2, 3], [1, 0, 0]], ids=str)
def test_three_axes_turn_as_in_transformers(sections):
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    pairs, T = sum(sections), 19
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    rope |= {"mrope_section": sections, "mrope_interleaved": True}
    config = modeling.Qwen3_5TextConfig(head_dim=4 * pairs, rope_parameters=rope)
    rotary = modeling.Qwen3_5TextRotaryEmbedding(config)
    positions = torch.randint(0, 40, (3, T), generator=torch.Generator().manual_seed(5))
    cos, sin = (x[0] for x in rotary(torch.zeros(1), positions[:, None]))

    frequencies = torch.arange(40)[:, None] * rotary.inv_freq
    cos_sin = torch.cat([frequencies.cos(), frequencies.sin()], dim=-1)
    expected = torch.cat([cos[:, :pairs], sin[:, :pairs]], dim=-1)
    axes = mrope_axes(2 * pairs, sections)
    table = mrope_table(cos_sin, positions, axes)
    torch.testing.assert_close(table, expected)
    assert table.is_contiguous()  # as the kernel wants it
    alike = positions[:1].expand(3, -1)
    assert torch.equal(mrope_table(cos_sin, alike, axes), cos_sin[positions[0]])
