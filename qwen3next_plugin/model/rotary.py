"""The table of rotary positions, plain or extended by YaRN, for the trunk and the drafter."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.config.rope import ORIGINAL

# Rows behind the context's: on a GPU SGLang drafts, and begins the next step, before it knows that
# a request has ended. With 8 drafts that is fewer than 32 tokens; a row takes 128 bytes in bf16.
BEYOND = 256


def rotary_table(config: Qwen3NextConfig) -> torch.Tensor:
    """Cosines, then sines, of every position that RoPE covers, in torch's default dtype.

    It is on the default device. All layers of a process share one table: at a million positions
    it takes 134 MB in bfloat16. Its last rows are for drafts of a request's last tokens.

    Shapes:
        returns [config.max_length + BEYOND, rotary_dim]

    Source: `_compute_yarn_parameters` of transformers, and the paper, arXiv 2309.00071.
    """
    numbers = tuple(
        (name, value)
        for name, value in sorted(config.rope_parameters.items())
        if not name.startswith("mrope_")  # the axes of an image's positions share the table
    )
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    return _table(numbers, config.rotary_dim, config.max_length + BEYOND, dtype, device)


@lru_cache(maxsize=8)
def _table(
    numbers: tuple[tuple[str, Any], ...],
    rotary_dim: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    rope = dict(numbers)
    with torch.device("cpu"):
        speeds = frequencies(rope, rotary_dim)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * speeds  # [positions, pairs]
        table = torch.cat([angles.cos(), angles.sin()], dim=1)
        return table.mul_(attention_factor(rope)).to(device=device, dtype=dtype)


def frequencies(rope: Mapping[str, Any], rotary_dim: int) -> torch.Tensor:
    """The rotation of each pair of dims per position.

    YaRN keeps pairs that turn at least `beta_fast` times within the original length, divides the
    frequency of those that turn at most `beta_slow` times by its factor, and blends the others.

    Shapes:
        returns [rotary_dim / 2], fp32
    """
    # In transformers' order of operations: at a million positions its last bit shows.
    periods = rope["rope_theta"] ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    if rope["rope_type"] != "yarn":
        return 1.0 / periods
    low, high = _blended_pairs(rope, rotary_dim)
    ramp = (torch.arange(rotary_dim // 2).float() - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope["factor"] * periods) * (1 - kept) + 1.0 / periods * kept


def _blended_pairs(rope: Mapping[str, Any], rotary_dim: int) -> tuple[float, float]:
    """The pairs between which YaRN blends."""

    def pair(turns: float) -> float:
        """The pair that makes this many turns within the original length."""
        ratio = math.log(rope[ORIGINAL] / (turns * 2 * math.pi))
        return rotary_dim * ratio / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high + (0.001 if low == high else 0)


def attention_factor(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosines and sines by."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if over and under:
        return _mscale(rope["factor"], over) / _mscale(rope["factor"], under)
    return _mscale(rope["factor"], 1)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
