"""The rotary table is transformers', at every position that RoPE covers."""

from pathlib import Path

import pytest
import torch

from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model import rotary
from qwen3next_plugin.model.attention import mrope_axes, mrope_table

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000_000,
    "partial_rotary_factor": 0.25,
    "factor": 4.0,
    "original_max_position_embeddings": 262_144,
}
SMALL = YARN | {"rope_theta": 10_000, "original_max_position_embeddings": 2048}
CASES = {
    "plain": {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.5},
    "factor-4": SMALL,
    "factor-1": SMALL | {"factor": 1.0},
    "factor-1.7": SMALL | {"factor": 1.7, "partial_rotary_factor": 1.0},
    "attention-factor": SMALL | {"attention_factor": 0.9},
    "mscale": SMALL | {"mscale": 1.2, "mscale_all_dim": 0.7},
    "betas": SMALL | {"beta_fast": 8, "beta_slow": 2, "truncate": False},
    "one-blended-pair": SMALL | {"original_max_position_embeddings": 8},
}
TOLERANCE = 1e-6  # a few units in the last place of a cosine


@pytest.fixture(autouse=True)
def forgotten():
    """A table of a million positions does not stay in memory."""
    yield
    rotary._table.cache_clear()


def theirs(config: Qwen3NextConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    host = modeling.Qwen3NextConfig(
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope_parameters),
    )
    cos, sin = modeling.Qwen3NextRotaryEmbedding(host)(torch.empty(0), positions[None])
    return cos[0], sin[0]


def check(config: Qwen3NextConfig, positions: torch.Tensor) -> None:
    found, half = rotary.rotary_table(config), config.rotary_dim // 2
    assert found.shape == (config.max_length + rotary.BEYOND, config.rotary_dim)
    assert found.dtype == torch.float32
    cos, sin = theirs(config, positions)
    torch.testing.assert_close(found[positions, :half], cos[:, :half], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[positions, half:], sin[:, :half], rtol=0, atol=TOLERANCE)


def config(name: str = "Qwen3-Next-80B-A3B", **changes) -> Qwen3NextConfig:
    raw = read_config(CONFIGS / name)
    changes |= dict.fromkeys(("rope_theta", "partial_rotary_factor", "rope_scaling"))
    return Qwen3NextConfig.from_hf(raw | changes)


@pytest.mark.parametrize("rope", CASES.values(), ids=CASES)
def test_every_position_is_transformers(rope):
    small = config(max_position_embeddings=2048, rope_parameters=rope)
    check(small, torch.arange(small.max_length + rotary.BEYOND))


def test_a_million_positions_are_transformers():
    released = config(rope_parameters=YARN)
    some = torch.randint(1_010_000, (20_000,), generator=torch.Generator().manual_seed(0))
    check(released, torch.cat([some, torch.tensor([0, 262_143, 262_144, 1_009_999, 1_048_575])]))


def test_all_layers_share_one_table_in_the_default_dtype():
    small = config(max_position_embeddings=2048, rope_parameters=SMALL)
    images = config(
        max_position_embeddings=2048,
        rope_parameters=SMALL | {"mrope_section": [11, 11, 10], "mrope_interleaved": True},
    )
    assert rotary.rotary_table(small) is rotary.rotary_table(images)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = rotary.rotary_table(small)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rounded, rotary.rotary_table(small).bfloat16())


def test_images_turn_by_their_sections_under_yarn():
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    sections = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    ours = config(max_position_embeddings=2048, rope_parameters=SMALL | sections)
    host = modeling.Qwen3_5TextConfig(
        head_dim=ours.head_dim, max_position_embeddings=2048, rope_parameters=SMALL | sections
    )
    positions = torch.randint(8192, (3, 500), generator=torch.Generator().manual_seed(0))
    cos, sin = modeling.Qwen3_5TextRotaryEmbedding(host)(torch.empty(0), positions[:, None])
    axes = mrope_axes(ours.rotary_dim, ours.mrope_section)
    found = mrope_table(rotary.rotary_table(ours), positions, axes)
    half = ours.rotary_dim // 2
    torch.testing.assert_close(found[:, :half], cos[0, :, :half], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[:, half:], sin[0, :, :half], rtol=0, atol=TOLERANCE)
