"""Positions of images in prompts, which have three axes, for the MTP layer."""

from collections.abc import Sequence
from typing import Any

import torch


def mrope_positions(
    images: Sequence[Any], positions: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor | None:
    """Positions in time, height and width; None where no request has images.

    Shapes: images, counts [N], positions [sum(counts)], returns [3, sum(counts)]
    """
    if all(of_request is None for of_request in images):
        return None
    parts = zip(images, positions.split(list(counts)), strict=True)
    return torch.cat([_of_request(*part) for part in parts], dim=1)


def _of_request(images: Any, positions: torch.Tensor) -> torch.Tensor:
    if images is None:
        return positions.expand(3, -1)
    of_prompt = images.mrope_positions.to(positions.device)  # [3, prompt]
    after = positions + images.mrope_position_delta.flatten().to(positions.device)
    inside = positions < of_prompt.shape[1]
    at = positions.clamp(max=of_prompt.shape[1] - 1)
    return torch.where(inside, of_prompt[:, at], after)
